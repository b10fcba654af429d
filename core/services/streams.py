"""Reads what followers of jobs have missed, and whether their jobs are over.

One statement reads the events and the job's status in one snapshot. So a job that is seen as ended has no later event.
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

# `_NUM_EVENTS` is divided among all watches of one read, with `_MIN_EVENTS` for each at least. A watch that is far
# behind needs few reads, and many watches that return at once do not fill the memory.
_NUM_EVENTS = 1000
_MIN_EVENTS = 50


@dataclass(frozen=True)
class Watch:
    """One follower of one job: its API key, and the last event number that it has."""

    job_id: uuid.UUID
    key_id: str
    after: int


@dataclass(frozen=True, slots=True)
class MissedEvent:
    """The columns of one event, in the order of the query."""

    number: int
    id: uuid.UUID
    level: str
    type: str
    message: str
    details: dict[str, Any] | None
    created_at: dt.datetime


@dataclass(frozen=True)
class WatchState:
    """The next events of a watch, oldest first and bounded in number. `has_more` says that there may be more.

    `final_status` is set once the job has ended and `events` are its last. `is_key_live` is False for a key that was
    revoked or has expired.
    """

    events: tuple[MissedEvent, ...]
    final_status: str | None
    is_key_live: bool
    has_more: bool


def read_watches(session: TenantSession, tenant_id: uuid.UUID, *, watches: Sequence[Watch]) -> list[WatchState]:
    """Return the state of each of one tenant's watches, in their order. An unknown job looks like one without any."""
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
    """Return rows of (position of the watch from 1, the job's status, an event's columns or None), in order.

    A deleted job has its last status and no events, so that its followers learn that it is over.
    """
    positions = func.unnest(
        literal(list(range(1, len(watches) + 1)), ARRAY(Integer)),
        literal([watch.job_id for watch in watches], ARRAY(Uuid)),
        literal([watch.after for watch in watches], ARRAY(BigInteger)),
    )
    watched = positions.table_valued(
        column("position", Integer), column("job_id", Uuid), column("after", BigInteger)
    ).render_derived(name="watched")
    # For each watch the lateral query reads the index on (job_id, number) from `after` on, and stops after `limit`
    # rows.
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
