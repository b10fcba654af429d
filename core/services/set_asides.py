"""Rows set aside: when a duty fails on one row, it leaves this row alone for a while and continues with the others.

The row's changes are rolled back to a savepoint, and the reason is stored.

| what the work on a row raises | the row |
|---|---|
| an error over the row's data: one of `ROW_ERRORS` | is set aside |
| a time limit of a statement or transaction (`took_too_long`) | is set aside |
| another of `DATABASE_ERRORS`: the database is away | is not at fault; the error is raised |
| any other error | the error is raised: the code is at fault |

A row set aside is tried again after `FIRST_REST_SECONDS`. The pause doubles with each failure, up to
`LONGEST_REST_SECONDS`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import structlog
from pydantic import ValidationError
from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, NoResultFound
from sqlalchemy.orm import InstrumentedAttribute

from core.db.models import SetAside
from core.db.session import DATABASE_ERRORS, DamagedRowError, OperatorSession, ServiceSession, took_too_long
from core.domain.duties import FIRST_REST_SECONDS, LONGEST_REST_SECONDS, Duty

log = structlog.get_logger()

# The errors that invalid data in a row causes: PostgreSQL refuses a value or its bytes, or our code finds something
# that it does not expect. DamagedRowError is also one of DATABASE_ERRORS. During the work on one row it counts as the
# row's.
ROW_ERRORS = (
    DamagedRowError,
    DataError,
    IntegrityError,
    NoResultFound,
    AssertionError,
    LookupError,
    TypeError,
    ValueError,
)
_MAX_REASON_LENGTH = 300
_REMEMBERED_FOR = timedelta(days=1)


@dataclass
class Trial:
    """The work on one row. `is_done` is True once it has succeeded."""

    is_done: bool = False


@contextmanager
def setting_aside(session: ServiceSession, duty: Duty, *, row_id: uuid.UUID, tenant_id: uuid.UUID) -> Iterator[Trial]:
    """Run a block for one row. If the row is at fault, undo the block's changes, set the row aside and continue."""
    trial = Trial()
    try:
        with session.begin_nested():
            yield trial
        trial.is_done = True
    except (*ROW_ERRORS, *DATABASE_ERRORS) as error:
        if not isinstance(error, ROW_ERRORS) and not took_too_long(error):
            raise
        set_aside(session, duty, row_id=row_id, tenant_id=tenant_id, error=error)


def set_aside(
    session: ServiceSession, duty: Duty, *, row_id: uuid.UUID, tenant_id: uuid.UUID, error: Exception
) -> None:
    """Let a duty leave a row alone for a while, and for twice as long after each further failure."""
    reason = _describe(error)
    log.error("row.set_aside", duty=duty, row_id=str(row_id), tenant_id=str(tenant_id), reason=reason)
    first = insert(SetAside).values(
        duty=duty,
        row_id=row_id,
        tenant_id=tenant_id,
        reason=reason,
        retry_at=func.now() + timedelta(seconds=FIRST_REST_SECONDS),
    )
    doubled = FIRST_REST_SECONDS * func.power(2, func.least(SetAside.num_failures, 10))
    rest = func.make_interval(0, 0, 0, 0, 0, 0, func.least(doubled, LONGEST_REST_SECONDS))
    session.execute(
        first.on_conflict_do_update(
            index_elements=[SetAside.duty, SetAside.row_id],
            set_={"reason": reason, "num_failures": SetAside.num_failures + 1, "retry_at": func.now() + rest},
        )
    )


def is_in_reach(duty: Duty, row_id: ColumnElement[uuid.UUID] | InstrumentedAttribute[uuid.UUID]) -> ColumnElement[bool]:
    """Return the condition that a duty may try a row now."""
    resting = SetAside.retry_at > func.now()
    return ~select(SetAside.row_id).where(SetAside.duty == duty, SetAside.row_id == row_id, resting).exists()


def list_set_asides(session: OperatorSession) -> Sequence[SetAside]:
    """Return the rows set aside, of all tenants, the oldest first. For operators."""
    return session.scalars(select(SetAside).order_by(SetAside.created_at)).all()


def forget_set_asides(session: ServiceSession) -> None:
    """Forget each row whose retry was due over a day ago and has not failed again. It was done, or is gone."""
    session.execute(delete(SetAside).where(SetAside.retry_at < func.now() - _REMEMBERED_FOR))


def _describe(error: Exception) -> str:
    """Describe an error in one line, without the row's values."""
    match error:
        case DBAPIError():
            told = getattr(getattr(error.orig, "diag", None), "message_primary", None) or type(error.orig).__name__
        case ValidationError():
            told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        case _:
            told = f"{type(error).__name__}: {error}"
    return told[:_MAX_REASON_LENGTH]
