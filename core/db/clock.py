"""The database's time, as a process estimates it between two readings.

Deadlines, presigned URLs and signed requests all use the database's time, because a host's own clock may be wrong and
may jump. This clock starts from the database's last answer and advances by the monotonic clock.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from dataclasses import dataclass

import structlog
from sqlalchemy import Engine, func, select

from core.db.session import DATABASE_ERRORS, ServiceSession, service_transaction

log = structlog.get_logger()
# S3 refuses a signature that is 15 minutes off, and presigned URLs live for as long. Clocks under NTP differ by
# milliseconds.
MAX_OFFSET_SECONDS = 30.0
_REREAD_SECONDS = 60.0  # in this time no working clock drifts by a second
_RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class _Reading:
    """The database's time was `at` when the monotonic clock was `monotonic`, to within `error_seconds`."""

    at: dt.datetime
    monotonic: float
    error_seconds: float


class DatabaseClock:
    """A clock shared by the threads of a process. Until its first reading of the database it shows the host's time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._asking = threading.Lock()
        self._asked_at: float | None = None
        self._reading: _Reading | None = None

    def now(self) -> dt.datetime:
        """Return the database's time. Asks for it if the last reading is old, unless the database is away."""
        self._refresh()
        return self.recall()

    def recall(self) -> dt.datetime:
        """Return the database's time from the last reading, without waiting. Another thread has to `keep` it."""
        reading = self._reading
        return dt.datetime.now(dt.UTC) if reading is None else _extrapolate(reading)

    def keep(self, stop_requested: threading.Event) -> None:
        """Read the database's time whenever it is due, until told to stop."""
        while not stop_requested.is_set():
            self._refresh()
            stop_requested.wait(_RETRY_SECONDS)

    def read(self, session: ServiceSession) -> None:
        """Read the database's time in the caller's transaction. Half of the round trip counts as the way there."""
        session.connection()  # a connection may take seconds to open, which must not count as part of the round trip
        sent_at = time.monotonic()
        at = session.scalars(select(func.clock_timestamp())).one()
        seconds = time.monotonic() - sent_at
        self._reading = _Reading(at, sent_at + seconds / 2, seconds / 2)

    @property
    def offset_seconds(self) -> float | None:
        """How far the host's clock is ahead of the database's now, or None if that is unknown."""
        reading = self._reading
        return None if reading is None else (dt.datetime.now(dt.UTC) - _extrapolate(reading)).total_seconds()

    @property
    def is_wrong(self) -> bool:
        """Whether the host's clock is certainly off by more than the bound."""
        reading, offset = self._reading, self.offset_seconds
        return reading is not None and offset is not None and abs(offset) - reading.error_seconds > MAX_OFFSET_SECONDS

    def is_right(self) -> bool:
        """Say whether the host's clock is known to be right. Asks the database if it was never asked."""
        if self._reading is None:
            self._refresh()
        return self._reading is not None and not self.is_wrong

    def _refresh(self) -> None:
        if not self._is_due() or not self._asking.acquire(blocking=False):
            return
        try:
            self._asked_at = time.monotonic()
            with service_transaction(self._engine) as session:
                self.read(session)
        except DATABASE_ERRORS as error:
            log.warning("clock.unread", error=type(error).__name__)
        finally:
            self._asking.release()

    def _is_due(self) -> bool:
        now = time.monotonic()
        is_old = self._reading is None or now - self._reading.monotonic > _REREAD_SECONDS
        return is_old and (self._asked_at is None or now - self._asked_at > _RETRY_SECONDS)


def _extrapolate(reading: _Reading) -> dt.datetime:
    return reading.at + dt.timedelta(seconds=time.monotonic() - reading.monotonic)
