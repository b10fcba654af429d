"""Deletes rows that are older than they are kept, in small transactions. Safe to run twice at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import structlog
from sqlalchemy import Engine

from core.db.session import ServiceSession, service_transaction
from core.services.retention import Kind, forget_some
from core.settings import ScheduleSettings
from schedule.metrics import ROWS_DELETED

log = structlog.get_logger()
# The limit for one kind in one run, so that the first run after years does not delay the other kinds.
_MAX_BATCHES = 1000
_OVER_DAYS = 30  # no request can use a completed or cancelled upload, or a deleted file


def days_kept(settings: ScheduleSettings) -> dict[Kind, int]:
    """Return for how many days each kind is kept. 0 means for ever."""
    return {
        Kind.LOG_LINES: settings.keep_log_lines_days,
        Kind.EVENTS: settings.keep_events_days,
        Kind.METRICS: settings.keep_metrics_days,
        Kind.CHECKPOINTS: settings.keep_checkpoints_days,
        Kind.JOBS: settings.keep_jobs_days,
        Kind.UPLOADS: _OVER_DAYS,
        Kind.FILES: _OVER_DAYS,
        Kind.AUDIT_ENTRIES: settings.keep_audit_days,
    }


def forget(engine: Engine, days_by_kind: Mapping[Kind, int], *, may_go_on: Callable[[ServiceSession], bool]) -> None:
    """Delete what is due. `may_go_on` is asked before each transaction. Raises OperationalError."""
    for kind, days in days_by_kind.items():
        if days and (num_rows := _forget_kind(engine, kind, days, may_go_on)):
            log.info("rows.forgotten", kind=kind, days=days, **num_rows)


def _forget_kind(engine: Engine, kind: Kind, days: int, may_go_on: Callable[[ServiceSession], bool]) -> Counter[str]:
    forgotten: Counter[str] = Counter()
    for _ in range(_MAX_BATCHES):
        with service_transaction(engine) as session:
            if not may_go_on(session):
                break
        with service_transaction(engine) as session:
            batch = forget_some(session, kind, days=days)
        for table, num_rows in batch.num_rows.items():
            ROWS_DELETED.labels(table).inc(num_rows)
        forgotten += batch.num_rows
        if not batch.has_more:
            break
    return forgotten
