"""The leases that a supervisor holds: prolonged while its trainer lives, given up when the database is unreachable.

Two threads do this, so that no other work can delay a lease. One prolongs, over its own connection. The other only
watches the clock, so that a hanging database cannot keep it from stopping the trainer.

Deadlines are by the database's clock. This process measures by its monotonic clock how long ago its last successful
heartbeat was sent. It stops its trainer at two thirds of a lease, before another worker may start the same job
(times in leases):

    0      a heartbeat is sent, and the database prolongs the lease
    2/3    no later heartbeat has been answered: `fence` kills the trainer
    3/3    the lease ends by the database's clock, and another worker may claim the job
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from sqlalchemy import Engine

from core.db.session import DATABASE_ERRORS, service_transaction
from core.domain.leases import Lease, StaleLeaseError
from core.services.leases import heartbeat
from core.services.set_asides import ROW_ERRORS
from core.telemetry.liveness import PROCESS
from worker.supervisor.metrics import SELF_FENCES

log = structlog.get_logger()
_SELF_FENCE_FRACTION = 2 / 3
_LOOKS_PER_LEASE = 50
_PATIENCE_SECONDS = 60.0  # longer than a lease, which is lost by then


@dataclass(frozen=True)
class LeaseNews:
    """The result of a heartbeat: the lease is lost, or its job is to pause."""

    lease: Lease
    is_lost: bool


class LeaseKeeper:
    """Prolongs leases at intervals. `engine` is its own; `is_live` says whether the leases may be prolonged.

    When no heartbeat has succeeded for two thirds of a lease, `fence` is called on one of the keeper's threads.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        lease_seconds: float,
        heartbeat_seconds: float,
        is_live: Callable[[], bool],
        fence: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._is_live = is_live
        self._fence = fence
        self._lock = threading.Lock()
        self._leases: dict[int, Lease] = {}
        self._beat_at = 0.0
        self._is_fenced = False
        self._news: queue.SimpleQueue[LeaseNews] = queue.SimpleQueue()
        patience_seconds = lease_seconds + _PATIENCE_SECONDS
        self._prolonging = PROCESS.add_duty("prolonging leases", patience_seconds=patience_seconds)
        self._watching = PROCESS.add_duty("watching leases run out", patience_seconds=patience_seconds)
        for name, work in (("heartbeats", self._prolong_forever), ("self-fence", self._watch_clock)):
            PROCESS.start_thread(work, name=name)

    @property
    def is_fenced(self) -> bool:
        """True when other workers may soon hold these leases, until all of them are dropped."""
        return self._is_fenced

    def hold(self, lease: Lease, *, since: float) -> None:
        """Prolong a lease from now on. `since` is the monotonic time just before the claim."""
        with self._lock:
            if not self._leases:
                self._beat_at, self._is_fenced = since, False
            self._leases[lease.token] = lease

    def let_go(self, lease: Lease) -> None:
        with self._lock:
            self._leases.pop(lease.token, None)

    def take_news(self) -> tuple[LeaseNews, ...]:
        """Return what the heartbeats have found since the last call."""
        return tuple(self._news.get() for _ in range(self._news.qsize()))

    def _prolong_forever(self) -> None:
        while True:
            time.sleep(self._heartbeat_seconds)
            self._prolonging.beat()
            if not self._is_live():
                continue
            try:
                self._prolong_all()
            except DATABASE_ERRORS as error:
                log.warning("heartbeat.failed", error=type(error).__name__)

    def _prolong_all(self) -> None:
        started = time.monotonic()
        with self._lock:
            leases = tuple(self._leases.values())
        for lease in leases:
            self._prolong(lease)
        # Counted from before the first heartbeat was sent, because the database may have prolonged the lease at once
        # and answered late. `hold` may have set a later time meanwhile.
        with self._lock:
            self._beat_at = max(self._beat_at, started)

    def _prolong(self, lease: Lease) -> None:
        try:
            with service_transaction(self._engine) as session:
                must_pause = heartbeat(session, lease, lease_seconds=self._lease_seconds)
        except StaleLeaseError:
            self._news.put(LeaseNews(lease, is_lost=True))
            return
        except ROW_ERRORS as error:  # this lease expires, and does not keep the others from being prolonged
            log.error("lease.unprolongable", lease_token=lease.token, error=type(error).__name__)  # noqa: TRY400
            return
        if must_pause:
            self._news.put(LeaseNews(lease, is_lost=False))

    def _watch_clock(self) -> None:
        while True:
            time.sleep(self._lease_seconds / _LOOKS_PER_LEASE)
            self._watching.beat()
            with self._lock:  # a lease taken now must not be fenced because of the silence before it
                silent_seconds = time.monotonic() - self._beat_at
                is_late = bool(self._leases) and silent_seconds > self._lease_seconds * _SELF_FENCE_FRACTION
                must_fence = is_late and not self._is_fenced
                self._is_fenced |= is_late
            if must_fence:
                log.error("worker.self_fenced", silent_seconds=round(silent_seconds, 2))
                SELF_FENCES.inc()
                self._fence()
