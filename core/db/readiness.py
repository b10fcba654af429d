"""Whether the database answers, for those who ask a process whether it is ready."""

from __future__ import annotations

from sqlalchemy import Engine

from core.db.session import DATABASE_ERRORS, ping


def find_database_obstacle(engine: Engine) -> str | None:
    """Return in one line why the database cannot be used, or None."""
    try:
        ping(engine)
    except DATABASE_ERRORS as error:
        return f"the database does not answer: {type(error).__name__}"
    return None
