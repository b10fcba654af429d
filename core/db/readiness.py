"""Whether a process can work: the database answers, and its schema is as new as this code needs.

Revisions are numbers, 0001 and upwards. Code on an older schema would ask for tables and columns that are not there. On
a newer one it works as before, since migrations only add at first, so it stays ready through an upgrade.
"""

from __future__ import annotations

from functools import cache

from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

from core.db.revisions import list_revisions
from core.db.session import DATABASE_ERRORS
from core.domain.errors import UnavailableError

# SQLSTATEs: there is no such table, or it is from before the runtime roles were let in (0021).
_UNREADABLE = ("42P01", "42501")


class OldSchemaError(UnavailableError):
    """The schema is older than this code needs. The message names what to do."""


def check_database(engine: Engine) -> None:
    """Raise OldSchemaError, or one of DATABASE_ERRORS, where this process cannot work. It costs one statement."""
    found, needed = _read_revision(engine), _newest_revision()
    if found is None:
        raise OldSchemaError(
            f"The schema is missing or too old, and this version needs {needed}: run espalier migrate."
        )
    if int(found) < int(needed):
        raise OldSchemaError(f"The schema is at {found} and this version needs {needed}: run espalier migrate.")


def find_database_obstacle(engine: Engine) -> str | None:
    """Return in one line why the database cannot be used, or None."""
    try:
        check_database(engine)
    except OldSchemaError as error:
        return error.message
    except DATABASE_ERRORS as error:
        return f"the database does not answer: {type(error).__name__}"
    return None


def _read_revision(engine: Engine) -> str | None:
    try:
        with engine.connect() as connection:
            found: str | None = connection.scalar(text("select version_num from alembic_version"))
    except ProgrammingError as error:
        if getattr(error.orig, "sqlstate", "") not in _UNREADABLE:
            raise
        return None
    return found


@cache
def _newest_revision() -> str:
    return list_revisions()[-1]
