"""The files for deployments name only settings that exist, and every setting is documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.known_settings import KNOWN, KNOWN_TOO, settings

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ROOT / "docs/operations.md"
FORMS = ("Dockerfile", "docker-compose.yml", ".env.example", "deploy/**/*", "k8s/**/*")
NAME = re.compile(r"\bESPALIER_[A-Z0-9_]+\b")
# What compose itself is told by, in .env: images, ports on the host, folders.
COMPOSE_ONLY = re.compile(r"ESPALIER_COMPOSE_[A-Z0-9_]+")
FILES = sorted({path for form in FORMS for path in ROOT.glob(form) if path.is_file()})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_deployment_sets_is_a_setting(path: Path) -> None:
    named = {name for name in NAME.findall(path.read_text(encoding="utf-8")) if not COMPOSE_ONLY.fullmatch(name)}
    assert not named - KNOWN - KNOWN_TOO


@pytest.mark.parametrize("path", sorted(ROOT.glob("deploy/systemd/*.service")), ids=lambda path: str(path.name))
def test_a_unit_lets_its_children_shut_themselves_out_of_secret_files(path: Path) -> None:
    """A call that a filter does not name ends the process. The schedule has no children."""
    lines = path.read_text(encoding="utf-8").splitlines()
    allowed = {
        word for line in lines if line.startswith("SystemCallFilter=") for word in line.partition("=")[2].split()
    }
    needed = {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"}
    assert not allowed or needed <= allowed or "schedule" in path.name


def test_a_workers_unit_downloads_to_where_it_may_write() -> None:
    unit = (ROOT / "deploy/systemd/espalier-worker@.service").read_text(encoding="utf-8").splitlines()
    assert {"ProtectSystem=strict", "ProtectHome=yes", "CacheDirectory=espalier"} <= set(unit)
    assert "Environment=HF_HOME=/var/cache/espalier/huggingface" in unit


def test_there_is_a_command_with_a_variable_of_its_own() -> None:
    assert "ESPALIER_REGISTRY" in KNOWN - settings()


@pytest.mark.parametrize("variable", sorted(KNOWN))
def test_every_setting_is_documented(variable: str) -> None:
    table = OPERATIONS.read_text(encoding="utf-8").partition("## Settings")[2].partition("\n## ")[0]
    documented = {name.removeprefix("ESPALIER_") for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", table)}
    assert variable.removeprefix("ESPALIER_") in documented
