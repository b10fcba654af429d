"""The worker's life: it serves while there is work, keeps a base loaded while there is none, and leaves.

One thread at a time serves, whether Celery's task or the watchdog has started it. It holds a lock while it serves. The
decision to leave is taken under the same lock, so that no job is claimed after a worker has said that it leaves.
"""

from __future__ import annotations

import threading
import time

import structlog
from sqlalchemy import Engine

from core.db.clock import DatabaseClock
from core.db.session import DATABASE_ERRORS, service_transaction
from core.domain.workers import WorkerFacts, WorkerState
from core.services import claims
from core.settings import WorkerSettings
from core.storage import ObjectStore
from core.version import read_version
from worker.messages import DeviceFigures
from worker.supervisor.bases import BaseHolder
from worker.supervisor.findings import BaseFindings
from worker.supervisor.identity import WorkerIdentity
from worker.supervisor.inspections import BaseInspector
from worker.supervisor.loading import TrainerStarter
from worker.supervisor.rounds import AWAY_SECONDS, Round

log = structlog.get_logger()


class Runner:
    """Serves pools until there is no work. `heartbeat_engine` serves leases only, so that no other work can delay them.

    It claims no job while the host's clock is wrong by `clock`. The jobs that it holds continue: leases are measured by
    the database's clock, seconds of use by the monotonic one, and URLs are signed with the database's time.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        engine: Engine,
        heartbeat_engine: Engine,
        store: ObjectStore,
        clock: DatabaseClock,
    ) -> None:
        self._settings = settings
        self._identity = WorkerIdentity.of_this_process(settings.worker_name)
        self._version = str(read_version())
        self._engine = engine
        self._clock = clock
        self._serving = threading.Lock()
        self._turned_at = self._idle_since = time.monotonic()
        self._stop_requested = stop_requested = threading.Event()
        starter = TrainerStarter(
            threads=settings.trainer_threads,
            scratch_dir=settings.scratch_dir,
            patience_seconds=settings.trainer_start_seconds,
            stop_requested=stop_requested,
        )
        name = str(self._identity)
        self._findings = BaseFindings(settings, name=name, engine=engine, store=store)
        self._base = BaseHolder(settings, starter=starter, findings=self._findings, stop_requested=stop_requested)
        self._inspector = BaseInspector(settings, starter=starter, base=self._base, findings=self._findings)
        self._round = Round(
            settings,
            name=name,
            engine=engine,
            heartbeat_engine=heartbeat_engine,
            store=store,
            clock=clock,
            base=self._base,
            findings=self._findings,
            stop_requested=stop_requested,
        )

    def request_stop(self) -> None:
        """Ask `serve` to give its jobs back and return. Safe from a signal's thread, and any number of times."""
        self._stop_requested.set()

    def describe(self) -> WorkerFacts:
        """Return what this worker holds now. Called from another thread than `serve`."""
        num_held = len(self._round.jobs)
        slots = max(self._base.slots, num_held)
        pool = self._base.shown_pool
        state: WorkerState = "serving" if num_held else "idle"
        if self._stop_requested.is_set():
            state = "stopping"
        elif self._base.is_loading:
            state = "loading"
        return WorkerFacts(
            name=str(self._identity),
            given_name=self._identity.given_name,
            pools=self._settings.worker_pools,
            state=state,
            pool=pool,
            slots=slots if pool else 0,
            slots_in_use=(slots if self._round.jobs.is_trying else num_held) if pool else 0,
            pool_seconds=self._base.held_seconds,
            next_pool=self._round.turns.next_pool,
            refusals=self._findings.refusals.standing,
            version=self._version,
            clock_offset_seconds=self._clock.offset_seconds,
            is_clock_wrong=self._clock.is_wrong,
        )

    @property
    def device_figures(self) -> DeviceFigures | None:
        """What the trainer last reported of the device, if there is a trainer."""
        return self._base.figures

    @property
    def idle_seconds(self) -> float:
        """How long this worker has had nothing to do; 0 while it serves."""
        return 0.0 if self._serving.locked() else time.monotonic() - self._idle_since

    @property
    def is_turning(self) -> bool:
        """False when the loop serves, loads no base, and has begun no round for as long as a trainer may stall.

        Also False when jobs are held while no thread serves, because their leases would be prolonged for ever.
        """
        if not self._serving.locked():
            return not self._round.jobs
        return self._base.is_loading or time.monotonic() - self._turned_at < self._settings.stall_seconds

    def has_claimable_work(self) -> bool:
        """Say whether there is a job to claim on a base that this worker may load. Raises the database's errors."""
        return self._clock.is_right() and self._has_waiting_work()

    def _has_waiting_work(self) -> bool:
        with service_transaction(self._engine) as session:
            loadable = self._findings.find_loadable(session)
            return any(pool in loadable for pool in claims.claimable_pools(session))

    def serve(self) -> None:
        """Work until none of this worker's pools has a claimable job and none is held. One caller at a time serves."""
        with self._serving:
            while not self._stop_requested.is_set():
                self._turned_at = time.monotonic()
                try:
                    if not self._round.run():
                        break
                except DATABASE_ERRORS as error:
                    log.warning("database.unavailable", error=type(error).__name__)
                    self._stop_requested.wait(AWAY_SECONDS)
            if self._stop_requested.is_set():
                self._round.give_back()
            self._idle_since = time.monotonic()

    def warm(self) -> None:
        """Hold a base while there is no work, and look at those in doubt. Raises the database's errors."""
        if self._serving.acquire(blocking=False):
            self._turned_at = time.monotonic()
            try:
                if not self._stop_requested.is_set() and not self.has_claimable_work():
                    self._base.warm()
            finally:
                self._serving.release()
        if not self._stop_requested.is_set():
            self._base.record_owed_state()
            self._inspector.inspect_others()

    def leave_if_idle(self, seconds: float) -> bool:
        """Stop serving if no job was held for this long and none waits. Raises the database's errors.

        The lock keeps the answer true: no job is claimed before it is given, and no thread serves after a yes. If a
        base took longer to load than a worker may idle, it is held for the time of its load first. A worker whose clock
        is wrong also stays while jobs wait that it cannot claim: if it left, an autoscaler would conclude that there is
        no work, and the clock would stay wrong.
        """
        if not self._serving.acquire(blocking=False):
            return False
        try:
            idle_seconds = min(self._round.jobs.jobless_seconds, self._base.held_seconds)
            if idle_seconds < seconds or self._has_waiting_work():
                return False
            self._stop_requested.set()
            return True
        finally:
            self._serving.release()

    def wait_until_idle(self) -> None:
        """After `request_stop`, wait until the serving thread has given its jobs back, for the grace at most."""
        if self._serving.acquire(timeout=self._settings.grace_seconds):
            self._serving.release()

    def close(self) -> None:
        self._round.close()
