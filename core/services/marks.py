"""How far the schedule has come with a duty that walks rows in the order in which they ended.

Whoever walks moves the mark in the transaction that does the work, so that neither is there without the other.
"""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.db.models import RetentionMark

_NO_JOB = uuid.UUID(int=0)


def find_mark(session: Session, kind: str) -> RetentionMark | None:
    return session.get(RetentionMark, kind)


def move_mark(session: Session, kind: str, *, to: dt.datetime, job_id: uuid.UUID = _NO_JOB) -> None:
    """Say that everything up to an instant, and up to this job at the instant itself, was walked."""
    values = {"finished_at": to, "job_id": job_id}
    statement = insert(RetentionMark).values(kind=kind, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["kind"], set_=values))
