"""The revisions of the schema that this code knows. It loads nothing of Alembic, so that every process may ask."""

from __future__ import annotations

from pathlib import Path

MIGRATIONS_DIR = Path(__file__).resolve().parents[2] / "migrations"


def list_revisions() -> tuple[str, ...]:
    """Return the revisions that this code knows, oldest first: each stands in the name of its file."""
    return tuple(path.name.partition("_")[0] for path in sorted((MIGRATIONS_DIR / "versions").glob("[0-9]*_*.py")))
