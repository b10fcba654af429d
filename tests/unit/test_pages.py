"""The pages of the repository name one another rightly: indexes are whole, and every link leads to something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]
DECISIONS = [path for path in sorted(ROOT.glob("docs/adr/*.md")) if path.name != "README.md"]
LINKS = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:)([^)\s]+)\)")
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
