"""The repository's pages refer to each other correctly: indexes are complete, and every link has a target."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
    ROOT / "tests/README.md",
]
DECISIONS = [path for path in sorted(ROOT.glob("docs/adr/*.md")) if path.name != "README.md"]
LINKS = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:)([^)\s]+)\)")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
STATUSES = {"proposed", "accepted", "superseded"}


def _without_code(page: str) -> str:
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


def _anchors(path: Path) -> set[str]:
    """What a forge makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", _without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_something(page: Path) -> None:
    lost = []
    for link in LINKS.findall(_without_code(page.read_text())):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", [each for each in PAGES if each not in DECISIONS], ids=lambda path: path.name)
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:api|core|worker|schedule|local|cli|tests|migrations|docs|bench)/[\w/]+\.py)`", page.read_text()
    )
    assert [each for each in named if not (ROOT / each).exists()] == []


def test_the_readme_names_every_page() -> None:
    named = {(ROOT / link.partition("#")[0]).resolve() for link in LINKS.findall((ROOT / "README.md").read_text())}
    assert {path.name for path in ROOT.glob("docs/*.md") if path not in named} == set()
    assert ROOT / "docs/adr/README.md" in named


@pytest.mark.parametrize("page", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_has_a_status_and_stands_in_the_index(page: Path) -> None:
    title = re.match(r"# (\d+)\. (.+)\n", page.read_text())
    status = re.search(r"^Status: (\w+), (\d{4}-\d\d-\d\d)", page.read_text(), re.MULTILINE)
    assert title is not None
    assert status is not None
    assert status[1] in STATUSES
    assert int(page.name[:4]) == int(title[1])
    row = f"| [{title[1]}]({page.name}) | {title[2]} | {status[1]} | {status[2]} |"
    assert row in (ROOT / "docs/adr/README.md").read_text()


def test_the_guide_names_files_that_exist() -> None:
    named = re.findall(r"`((?:api|core|worker|cli|tests|migrations|docs|deploy|k8s|bench|\.ci)/[\w./-]*)`", GUIDE)
    assert len(named) > 30
    assert [each for each in named if not (ROOT / each).exists() and not (ROOT / f"{each}.py").exists()] == []


def test_the_guide_names_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    named = {word for line in re.findall(r"`make ([a-z -]+)", GUIDE) for word in line.split()}
    assert named <= targets


def test_make_help_has_a_line_for_every_target() -> None:
    help_text = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert sorted(line.split()[0] for line in help_text.splitlines()) == sorted(phony[1].replace("\\", "").split())


def test_hooks_are_local_and_call_what_make_calls() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert {hook["entry"].split()[0] for hook in repo["hooks"]} <= {".venv/bin/ruff", ".venv/bin/mypy"}
