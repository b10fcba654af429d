"""Rows that a duty could not do: it leaves each alone for a while, with the reason, and does the others.

What one row raises is undone to a savepoint, and so is a statement over one row that ran into a time limit. What the
database raises because it is away is no row's fault and passes.
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

# What a row raises that holds what it should not: PostgreSQL over a value or its bytes, or our code over what it finds
# in it. Where one error is of these and of DATABASE_ERRORS, whoever has one row in hand takes it for the row's.
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
    """`is_done` once a row has been done."""

    is_done: bool = False


@contextmanager
def setting_aside(session: ServiceSession, duty: Duty, *, row_id: uuid.UUID, tenant_id: uuid.UUID) -> Iterator[Trial]:
    """Undo what the block did where its row is at fault, set the row aside, and go on behind the block."""
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
    """Let a duty leave a row alone for a while, each time it fails for twice as long."""
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
    """Return what is set aside, of all tenants, the oldest first. For operators."""
    return session.scalars(select(SetAside).order_by(SetAside.created_at)).all()


def forget_set_asides(session: ServiceSession) -> None:
    """Forget what has not failed for a day since it was to be tried again: it was done, or is gone."""
    session.execute(delete(SetAside).where(SetAside.retry_at < func.now() - _REMEMBERED_FOR))


def _describe(error: Exception) -> str:
    """Say what is wrong, in a line without the row's values."""
    match error:
        case DBAPIError():
            told = getattr(getattr(error.orig, "diag", None), "message_primary", None) or type(error.orig).__name__
        case ValidationError():
            told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        case _:
            told = f"{type(error).__name__}: {error}"
    return told[:_MAX_REASON_LENGTH]
