"""The append-only history of a job.

The events of one job are committed in the order of their numbers, because a writer holds the lock on the job's row
until its transaction ends. So a reader that has seen number n of a job never meets a lower number later, although
numbers are drawn at the insert and not at the commit. There is no such order between the events of different jobs.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import CTE, Uuid, bindparam, insert, literal, select, text

from core.db.models import Event, Job
from core.db.session import TenantSession, WorkWriter
from core.domain.ids import IdKind, new_id, not_found
from core.domain.values import Page

EVENT_CHANNEL = "espalier_events"


def record_event(
    session: WorkWriter,
    job: Job,
    *,
    message: str,
    level: Literal["info", "warn", "error"] = "info",
    details: dict[str, Any] | None = None,
) -> None:
    """Append an event and notify the job's followers. The caller holds the lock on the job's row, or has just added it.

    With `details` the event is of type "metrics".
    """
    session.add(
        Event(
            id=new_id(),
            tenant_id=job.tenant_id,
            job_id=job.id,
            level=level,
            type="message" if details is None else "metrics",
            message=message,
            details=details,
        )
    )
    session.execute(text("select pg_notify(:channel, :job_id)"), {"channel": EVENT_CHANNEL, "job_id": str(job.id)})


def insert_first_event(jobs: CTE, *, message: str) -> CTE:
    """Return the part of a statement that adds the first event, with the id in parameter `event_id`, to a new job."""
    values = {
        "id": bindparam("event_id", type_=Uuid),
        "tenant_id": jobs.c.tenant_id,
        "job_id": jobs.c.id,
        "level": literal("info"),
        "type": literal("message"),
        "message": literal(message),
    }
    return insert(Event).from_select(list(values), select(*values.values())).cte("first_event")


def list_events(
    session: TenantSession, tenant_id: uuid.UUID, *, job_id: uuid.UUID, after: uuid.UUID | None, limit: int
) -> Page[Event]:
    """Return a job's events, newest first, from behind the event `after`."""
    query = select(Event).where(Event.tenant_id == tenant_id, Event.job_id == job_id)
    if after is not None:
        number = session.scalar(select(Event.number).where(Event.tenant_id == tenant_id, Event.id == after))
        if number is None:
            raise not_found(IdKind.EVENT, after, param="after")
        query = query.where(Event.number < number)
    rows: Sequence[Event] = session.scalars(query.order_by(Event.number.desc()).limit(limit + 1)).all()
    return Page.cut(rows, limit)
