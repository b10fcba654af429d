"""The schema revisions that this code knows. The module does not import Alembic, so every process can afford it."""

from __future__ import annotations

from pathlib import Path

MIGRATIONS_DIR = Path(__file__).resolve().parents[2] / "migrations"


def list_revisions() -> tuple[str, ...]:
    """Return the revisions that this code knows, oldest first. A revision is the number in its file's name."""
    return tuple(path.name.partition("_")[0] for path in sorted((MIGRATIONS_DIR / "versions").glob("[0-9]*_*.py")))
