"""Tells the database that this worker is alive and what it holds, and compares the clocks.

It has its own thread, because the task of an idle worker has returned, and that of a busy one waits for its trainer. It
shows only that the supervisor process lives. The trainer's progress decides about leases.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog
from sqlalchemy import Engine

from core.db.clock import DatabaseClock
from core.db.session import DATABASE_ERRORS, service_transaction
from core.domain.workers import WorkerFacts
from core.services.workers import forget_worker, record_worker
from core.telemetry.liveness import PROCESS

log = structlog.get_logger()
_MISSED_BEATS = 3
_PATIENCE_SECONDS = 60.0
_STOP_SECONDS = 3.0  # longer only where the database is away


class Presence:
    """Upserts the worker's row at every interval, and at once when asked to. Removes it when closed."""

    def __init__(
        self, engine: Engine, clock: DatabaseClock, *, interval_seconds: float, describe: Callable[[], WorkerFacts]
    ) -> None:
        self._engine, self._interval_seconds, self._describe = engine, interval_seconds, describe
        self._clock = clock
        self._is_clock_wrong = False
        self._woken = threading.Event()
        self._stop_requested = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_start = True
        self._is_away = False

    def start(self) -> None:
        patience_seconds = self._interval_seconds * _MISSED_BEATS + _PATIENCE_SECONDS
        self._life = PROCESS.add_duty("showing presence", patience_seconds=patience_seconds)
        self._thread = PROCESS.start_thread(self._run, name="presence")

    def close(self) -> None:
        """Stop, and remove the row. If the database is unreachable, the row expires by itself."""
        if self._thread is None:
            return
        PROCESS.release(self._thread)
        self._stop_requested.set()
        self._woken.set()
        self._thread.join(_STOP_SECONDS)
        if self._is_away or self._thread.is_alive():
            return
        try:
            with service_transaction(self._engine) as session:
                forget_worker(session, self._describe().name)
        except DATABASE_ERRORS as error:
            log.warning("database.unavailable", error=type(error).__name__)

    def _run(self) -> None:
        while not self._stop_requested.is_set():
            self._life.beat()
            try:
                self._beat()
                self._is_away = False
            except DATABASE_ERRORS as error:
                self._is_away = True
                log.warning("database.unavailable", error=type(error).__name__)
            self._woken.wait(self._interval_seconds)
            self._woken.clear()
        self._life.rest()

    def _beat(self) -> None:
        with service_transaction(self._engine) as session:
            self._clock.read(session)
            alive_seconds = self._interval_seconds * _MISSED_BEATS
            record_worker(session, self._describe(), alive_seconds=alive_seconds, is_start=self._is_start)
        self._is_start = False
        self._log_clock()

    def _log_clock(self) -> None:
        was_wrong, self._is_clock_wrong = self._is_clock_wrong, self._clock.is_wrong
        if self._is_clock_wrong != was_wrong:
            event = "worker.clock_wrong" if self._is_clock_wrong else "worker.clock_right"
            log.warning(event, offset_seconds=round(self._clock.offset_seconds or 0.0, 3))
