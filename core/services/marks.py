"""Marks: how far a duty of the schedule has come in walking rows in the order in which they ended.

The mark moves in the transaction that does the work, so the two never differ.
"""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy.dialects.postgresql import insert

from core.db.models import RetentionMark
from core.db.session import ServiceSession

BEGINNING = dt.datetime.fromtimestamp(0, dt.UTC)
_NO_ROW = uuid.UUID(int=0)


def find_mark(session: ServiceSession, kind: str) -> RetentionMark:
    """Return how far a duty has come, or BEGINNING if it was never done."""
    return session.get(RetentionMark, kind) or RetentionMark(finished_at=BEGINNING, job_id=_NO_ROW)


def move_mark(session: ServiceSession, kind: str, *, to: dt.datetime, row_id: uuid.UUID = _NO_ROW) -> None:
    """Record that a duty has walked all rows up to an instant and, at this instant itself, up to this row."""
    values = {"finished_at": to, "job_id": row_id}
    statement = insert(RetentionMark).values(kind=kind, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["kind"], set_=values))
