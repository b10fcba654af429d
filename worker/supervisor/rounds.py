"""One round of the supervisor's loop, and the last rounds of a worker that stops.

A round reads top to bottom in `Round.run`: settle what is owed, hold a base, fill its slots, hear the trainer, record.
No transaction is open while the trainer, the object store or a clock is waited for. What could not be recorded because
the database was away is recorded in a later round.

Who owns what, each in its module; an arrow reads "calls":

    Runner -> Round -> DeathSettler   the death of a trainer that is not settled yet
                    -> TurnKeeper     the pool that comes next
                    -> ReportKeeper   reports that the database does not have yet
                       each -> HeldJobs       claimed jobs, their leases, the use that is not booked yet
                               -> BaseHolder  the base and its one trainer
                                  -> BaseFindings  which bases may be loaded, and why not the others
"""

from __future__ import annotations

import contextlib
import threading
import time

import structlog
from sqlalchemy import Engine

from core.crashpoints import CrashPoint, reach
from core.db.clock import DatabaseClock
from core.db.session import DATABASE_ERRORS, service_transaction
from core.domain.failures import Failure
from core.domain.scheduling import slot_seconds
from core.services import claims
from core.settings import WorkerSettings
from core.storage import ObjectStore
from worker.messages import StartJob
from worker.supervisor.artifacts import ArtifactProver
from worker.supervisor.bases import BaseHolder
from worker.supervisor.children import TrainerGoneError
from worker.supervisor.deaths import DeathSettler
from worker.supervisor.departures import Departures
from worker.supervisor.failures import STALLED, explain_exit
from worker.supervisor.findings import BaseFindings
from worker.supervisor.held_jobs import Claim, HeldJobs
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.metrics import CLAIM_SECONDS, observe_wait
from worker.supervisor.orders import order_job
from worker.supervisor.reports import ReportKeeper
from worker.supervisor.signing import Signing
from worker.supervisor.turns import TurnKeeper

log = structlog.get_logger()
AWAY_SECONDS = 0.5  # between two tries to reach a database that is away


class Round:
    """Owns the parts that serve jobs, and calls each in its order. It keeps no state of its own between rounds."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        name: str,
        engine: Engine,
        heartbeat_engine: Engine,
        store: ObjectStore,
        clock: DatabaseClock,
        base: BaseHolder,
        findings: BaseFindings,
        stop_requested: threading.Event,
    ) -> None:
        self._settings, self._name = settings, name
        self._engine = engine
        self._clock = clock
        self._base = base
        self._stop_requested = stop_requested
        self._departures = Departures(engine)
        self._signing = Signing(store)
        keeper = _start_keeper(settings, heartbeat_engine, base)
        charge_seconds = settings.heartbeat_seconds
        self.jobs = HeldJobs(
            engine, base=base, keeper=keeper, departures=self._departures, charge_seconds=charge_seconds
        )
        self._deaths = DeathSettler(engine, jobs=self.jobs, keeper=keeper)
        prover = ArtifactProver(store, patience_seconds=settings.storage_patience_seconds)
        self._reports = ReportKeeper(
            engine, signing=self._signing, prover=prover, base=base, jobs=self.jobs, departures=self._departures
        )
        self.turns = TurnKeeper(
            settings,
            name=name,
            engine=engine,
            base=base,
            findings=findings,
            jobs=self.jobs,
            departures=self._departures,
            stop_requested=stop_requested,
        )

    def run(self) -> bool:
        """Do what is due now. False when there is nothing left to do. Raises the database's errors."""
        # What must still be recorded comes first. While the database is away, an error ends the round here, and no job
        # is claimed.
        self._deaths.settle()
        self.jobs.book_usage()
        self.jobs.charge_use()
        self._departures.record()
        if not self.jobs and not self._hold_pool_with_work() and not self._departures.are_due:
            return False
        self._lend_slot()
        self._fill_slots()
        self.jobs.start_waiting()
        if not self.jobs:  # the waiting jobs cannot be claimed now: a quota is full, or another worker was quicker
            self._stop_requested.wait(AWAY_SECONDS)
        self._advance()
        return True

    def give_back(self) -> None:
        """Store every slot at its step boundary and queue the jobs again, all within the grace."""
        deadline = time.monotonic() + self._settings.grace_seconds
        while self.jobs and time.monotonic() < deadline:
            try:
                self.jobs.give_all_back()
                self._deaths.settle()
                self._advance()
            except DATABASE_ERRORS as error:
                log.warning("database.unavailable", error=type(error).__name__)
                time.sleep(AWAY_SECONDS)
        is_away = self._leave_the_rest()
        self.close()
        with contextlib.suppress(*DATABASE_ERRORS):
            if not is_away:
                self._departures.record()

    def close(self) -> None:
        """End the trainer. No attempt is on the device any more."""
        self._base.close()
        self._departures.note_all()

    def _hold_pool_with_work(self) -> bool:
        return self._clock.is_right() and self.turns.hold_pool_with_work()

    def _lend_slot(self) -> None:
        if self._is_ready:
            self.turns.lend_slot(has_room=self._has_room())

    def _fill_slots(self) -> None:
        if self._has_room() and self.turns.end_if_due():
            return
        while self._has_room():
            claim = self._signing.attempt(self._claim)
            if claim is None:
                return
            reach(CrashPoint.POST_CLAIM)
            observe_wait(claim.job, lease_seconds=self._settings.lease_seconds)
            self.jobs.hold(claim)

    def _claim(self, store: ObjectStore) -> Claim | None:
        """Claim a job and make its order, which contains signed URLs. Without an order the job is not claimed."""
        assert self._base.pool is not None
        began_at = time.monotonic()
        orders: list[StartJob] = []
        with CLAIM_SECONDS.time(), service_transaction(self._engine) as session:
            job = claims.claim_job(
                session,
                self._base.pool,
                worker_name=self._name,
                lease_seconds=self._settings.lease_seconds,
                is_idle=not self.jobs,
                slot_seconds=slot_seconds(self._settings.quantum_seconds, slots=self._base.slots),
                prepare=lambda job: orders.append(order_job(session, job, store=store)),
            )
        return None if job is None else Claim(job, orders[-1], began_at)

    def _has_room(self) -> bool:
        return self._is_ready and not self.jobs.is_trying and len(self.jobs) < self._base.slots

    @property
    def _is_ready(self) -> bool:
        is_leaving = self.turns.next_pool is not None or self._stop_requested.is_set()
        return self._base.is_held and self._deaths.is_settled and not is_leaving and self._clock.is_right()

    def _advance(self) -> None:
        """Read the trainer's reports, record them, and act on what the heartbeats found."""
        try:
            self._reports.take()
            self._stop_stalled()  # after all reports are read, and before the database may be slow
        except TrainerGoneError as error:
            self._note_death(explain_exit(error.exit_code))
        self._reports.grant_wanted()
        self._reports.record_progress()
        self._reports.publish_proofs()
        self.jobs.heed_news()

    def _stop_stalled(self) -> None:
        if (self.jobs or self._departures.are_due) and self._base.is_stalled:
            self._base.kill()
            self._note_death(STALLED)

    def _note_death(self, failure: Failure) -> None:
        self._deaths.note(failure)
        self.close()

    def _leave_the_rest(self) -> bool:
        """Queue the jobs that are still held, without their state, and return whether the database is away.

        If it is away it is asked only once: each question may take seconds, the grace is over, and leases expire.
        """
        is_away = False
        for held in self.jobs:
            log.warning("job.left_without_state", **held.ids)
            try:
                if not is_away:
                    self.jobs.requeue(held)
            except DATABASE_ERRORS:
                is_away = True
            self.jobs.drop(held, outcome="given_back")
        return is_away


def _start_keeper(settings: WorkerSettings, engine: Engine, base: BaseHolder) -> LeaseKeeper:
    return LeaseKeeper(
        engine,
        lease_seconds=settings.lease_seconds,
        heartbeat_seconds=settings.heartbeat_seconds,
        is_live=lambda: not base.is_stalled,
        fence=base.kill,
    )
