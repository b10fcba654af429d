"""Whether a process can work with the database.

| what is found | the error's code |
|---|---|
| no answer | `database_unavailable` |
| a standby, or a server that is read-only | `database_read_only` |
| no schema, one older than this code, or one whose revision this role may not read | `schema_too_old` |
| a schema as new as this code, or newer | none |

Revisions are numbers, from 0001 upwards. Code on an older schema would miss tables and columns. Code on a newer schema
works as before, because migrations first only add, so a process stays ready during an upgrade.
"""

from __future__ import annotations

from functools import cache

from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

from core.db.revisions import list_revisions
from core.db.session import DATABASE_ERRORS, state_of
from core.domain.errors import UnavailableError

# SQLSTATEs: the table is missing, or it is older than the runtime roles' right to read it (0021).
_UNREADABLE = ("42P01", "42501")
_STATE = text("select pg_is_in_recovery(), current_setting('transaction_read_only')::boolean")
_REVISION = text("select version_num from alembic_version")


def check_database(engine: Engine) -> None:
    """Raise UnavailableError, in one line that says why, where this process cannot work. It costs two statements."""
    try:
        with engine.connect() as connection:
            is_standby, is_read_only = connection.execute(_STATE).one()
            found: str | None = None if is_read_only else connection.scalar(_REVISION)
    except DATABASE_ERRORS as error:
        message = f"The database does not answer: {type(error).__name__}."
        raise UnavailableError(message, code="database_unavailable") from error
    except ProgrammingError as error:
        if state_of(error) not in _UNREADABLE:
            raise
        is_read_only, found = False, None
    if is_read_only:
        engine.dispose()  # after a failover the next connection may reach a server that takes writes
        what = "is a standby" if is_standby else "is read-only"
        raise UnavailableError(f"The database {what}: it takes no writes.", code="database_read_only")
    _check_revision(found)


def _check_revision(found: str | None) -> None:
    needed = _newest_revision()
    if found is not None and int(found) >= int(needed):
        return
    state = "is missing or too old, and this" if found is None else f"is at {found} and this"
    message = f"The schema {state} version needs {needed}: run espalier migrate."
    raise UnavailableError(message, code="schema_too_old")


@cache
def _newest_revision() -> str:
    return list_revisions()[-1]
