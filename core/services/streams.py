"""Following jobs: what has happened behind each watch's last event, and which watches are over.

One statement reads the events and the job's status in one snapshot, so that a job seen as ended has no event to come.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Integer, Uuid, and_, column, func, literal, select

from core.db.models import Event, Job
from core.db.session import TenantSession
from core.domain.jobs import TERMINAL_STATUSES
from core.services.api_keys import find_reading_keys

# So many events are read at once for all watches together, and so many at least for each. One that has much to catch up
# with takes few trips, and many that come back at once fill no memory.
_NUM_EVENTS = 1000
_MIN_EVENTS = 50


@dataclass(frozen=True)
class Watch:
    """One follower of one job: by which API key, and behind which event number."""

    job_id: uuid.UUID
    key_id: str
    after: int


@dataclass(frozen=True, slots=True)
class MissedEvent:
    """An event's own columns, in the order in which they are read."""

    number: int
    id: uuid.UUID
    level: str
    type: str
    message: str
    details: dict[str, Any] | None
    created_at: dt.datetime


@dataclass(frozen=True)
class WatchState:
    """What a watch has missed, oldest first and a bounded number, and whether there can be more.

    `final_status` is set once the job has ended and `events` are its last; `is_key_live` is False for a key that was
    revoked or has expired.
    """

    events: tuple[MissedEvent, ...]
    final_status: str | None
    is_key_live: bool
    has_more: bool


def read_watches(session: TenantSession, tenant_id: uuid.UUID, *, watches: Sequence[Watch]) -> list[WatchState]:
    """Return the state of each of one tenant's watches, in their order. An unknown job reads as one without events."""
    live_keys = find_reading_keys(session, tenant_id, {watch.key_id for watch in watches})
    limit = max(_MIN_EVENTS, _NUM_EVENTS // max(1, len(watches)))
    events: list[list[MissedEvent]] = [[] for _ in watches]
    statuses: list[str | None] = [None] * len(watches)
    for position, status, number, *columns in session.execute(_missed_events(tenant_id, watches, limit)):
        statuses[position - 1] = status
        if number is not None:
            events[position - 1].append(MissedEvent(number, *columns))
    return [
        _conclude(missed, status=status, is_key_live=watch.key_id in live_keys, has_more=len(missed) == limit)
        for watch, missed, status in zip(watches, events, statuses, strict=True)
    ]


def _conclude(missed: list[MissedEvent], *, status: str | None, is_key_live: bool, has_more: bool) -> WatchState:
    has_ended = status in TERMINAL_STATUSES and not has_more
    return WatchState(
        events=tuple(missed) if is_key_live else (),
        final_status=status if has_ended else None,
        is_key_live=is_key_live,
        has_more=has_more,
    )


def _missed_events(tenant_id: uuid.UUID, watches: Sequence[Watch], limit: int) -> Any:
    """Rows of (position of the watch from 1, the job's status, an event's columns or None), in order.

    A deleted job has its last status, so that its followers learn that it is over, and no event.
    """
    positions = func.unnest(
        literal(list(range(1, len(watches) + 1)), ARRAY(Integer)),
        literal([watch.job_id for watch in watches], ARRAY(Uuid)),
        literal([watch.after for watch in watches], ARRAY(BigInteger)),
    )
    watched = positions.table_valued(
        column("position", Integer), column("job_id", Uuid), column("after", BigInteger)
    ).render_derived(name="watched")
    missed = (
        select(*(getattr(Event, each.name) for each in fields(MissedEvent)))
        .where(Event.tenant_id == tenant_id, Event.job_id == watched.c.job_id, Event.number > watched.c.after)
        .order_by(Event.number)
        .limit(limit)
        .lateral("missed")
    )
    return (
        select(watched.c.position, Job.status, missed)
        .join(Job, and_(Job.id == watched.c.job_id, Job.tenant_id == tenant_id))
        .outerjoin(missed, Job.deleted_at.is_(None))
        .order_by(watched.c.position, missed.c.number)
    )
