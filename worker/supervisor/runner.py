"""The supervisor's loop: claim, hand to the trainer, record what it reports, end.

One base model is held at a time, and kept hot between jobs. The worker switches pools when its own has no work and
another has, or when the turn of its own is over and the job that is next is another's: then it stops claiming, and the
held jobs leave at resume points. A slot that has had its quantum is lent in the same way.

No transaction is open while the trainer, the object store or a clock is waited for, and what could not be recorded
because the database was away is recorded when it is back.

Who pays for a trainer that dies: a job that was alone in it is charged the attempt, and fails at once where another
attempt would meet the same end. When several were in it, nobody can say whose doing it was, so nobody is charged: all
are queued again under suspicion, and a suspect is claimed by an idle worker only and trained alone. One that gets ten
steps past the one at which its trainer died is acquitted; it is given back while other suspects wait for their turn,
and trains beside others again. The killer dies alone, is charged, and stays alone, until it has no attempt left. A job
that comes under suspicion again and again is not acquitted any more, so that this ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from core.crashpoints import CrashPoint, reach
from core.db.clock import DatabaseClock
from core.db.models import BaseModelRow, Job
from core.db.session import DATABASE_ERRORS, service_transaction
from core.domain.ids import IdKind, format_id
from core.domain.jobs import is_acquitted
from core.domain.leases import Lease, StaleLeaseError
from core.domain.scheduling import slot_seconds
from core.domain.workers import WorkerFacts, WorkerState
from core.services import announcements, attempts, charges, claims
from core.services.base_models import list_known_base_models
from core.services.set_asides import ROW_ERRORS
from core.settings import WorkerSettings
from core.storage import ObjectStore, StorageUnavailableError
from core.telemetry.tracing import AttemptTrace
from core.version import read_version
from worker.messages import (
    STORAGE_AWAY,
    CheckpointSaved,
    DatasetsRead,
    DeviceFigures,
    DeviceLeft,
    EvaluationDone,
    JobFailed,
    JobLogged,
    JobStarted,
    JobSucceeded,
    JobWarned,
    JobYielded,
    PhaseDone,
    Report,
    ResumePointSaved,
    SlotRefused,
    StartJob,
    StepDone,
    StepSkipped,
    StopJob,
    UrlsGranted,
    UrlsWanted,
    UsageCounted,
    YieldJob,
)
from worker.supervisor.artifacts import ArtifactProver, Proof, grant_uploads, result_filename
from worker.supervisor.bases import BaseHolder
from worker.supervisor.children import TrainerGoneError
from worker.supervisor.departures import Departures
from worker.supervisor.failures import DAMAGED, LEASE_LOST, STALLED, UNCONFIRMED, UNRECORDABLE, Failure, explain_exit
from worker.supervisor.identity import WorkerIdentity
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.metrics import (
    ATTEMPTS_ENDED,
    CLAIM_SECONDS,
    FENCED_WRITES,
    FIRST_STEP_SECONDS,
    TRAINERS_LOST,
    count_phase,
    count_use,
    observe_wait,
)
from worker.supervisor.orders import lease_of, order_job, pools_of
from worker.supervisor.records import ProgressReport, record_progress, record_proof
from worker.supervisor.turns import TurnKeeper

log = structlog.get_logger()
_POLL_SECONDS = 0.1
_AWAY_SECONDS = 0.5  # between two tries to reach a database that is away
_KEYLESS_SECONDS = 2.0  # between two tries to get keys to sign URLs with; one may take seconds
_MAX_REPORTS = 500  # of one turn of the loop
_OUTCOMES = {"job_succeeded": "succeeded", "job_failed": "failed", "job_yielded": "given_back"}


@dataclass
class HeldJob:
    """A claimed job; `usage` is what the trainer last counted, `is_delivered` when only the proof of its end lacks.

    `order` is what the trainer is to be sent, once it is: a job that must be alone waits until the others have left.
    `claimed_at` is by the monotonic clock.
    """

    lease: Lease
    pool: str
    claimed_at: float
    trace: AttemptTrace
    result_filename: str
    order: StartJob | None
    suspect_step: int | None
    num_suspicions: int
    usage: UsageCounted | None = None
    wants_memory: bool = False
    is_yielding: bool = False
    is_delivered: bool = False
    has_stepped: bool = False

    @property
    def ids(self) -> dict[str, str | int]:
        """What a line of the log names this attempt by."""
        return ids_of(self.lease)

    def note_progress(self, report: ProgressReport) -> None:
        """Note that it has a slot, and how long its first step took to come."""
        self.wants_memory &= not isinstance(report, JobStarted)
        if isinstance(report, StepDone | StepSkipped) and not self.has_stepped:
            self.has_stepped = True
            FIRST_STEP_SECONDS.labels(self.pool).observe(time.monotonic() - self.claimed_at)

    def is_acquitted_by(self, report: ProgressReport) -> bool:
        return (
            isinstance(report, StepDone | StepSkipped)
            and self.suspect_step is not None
            and is_acquitted(report.step, suspect_step=self.suspect_step, num_suspicions=self.num_suspicions)
        )


def ids_of(lease: Lease) -> dict[str, str | int]:
    return {
        "job_id": format_id(IdKind.JOB, lease.job_id),
        "lease_token": lease.token,
        "tenant_id": str(lease.tenant_id),
    }


@dataclass(frozen=True)
class Loss:
    """A trainer that is gone, and whether several jobs were in it."""

    failure: Failure
    is_shared: bool


class Runner:
    """Serves pools until there is no work. `heartbeat_engine` is the leases' own, so that nothing else starves them.

    It claims nothing while the host's clock is wrong by `clock`. What it holds goes on: leases are the database's
    matter, seconds of use are monotonic, and URLs are signed with the database's time.
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
        self._identity = WorkerIdentity.of_this_process(settings.worker_name)
        self._clock = clock
        self._settings = settings
        self._engine = engine
        self._store = store
        self._stop_requested = threading.Event()
        name = str(self._identity)
        self._base = BaseHolder(settings, name=name, engine=engine, store=store, stop_requested=self._stop_requested)
        self._keeper = LeaseKeeper(
            heartbeat_engine,
            lease_seconds=settings.lease_seconds,
            heartbeat_seconds=settings.heartbeat_seconds,
            is_live=self._is_live,
            fence=self._base.kill,
        )
        self._prover = ArtifactProver(store, patience_seconds=settings.storage_patience_seconds)
        self._turns = TurnKeeper(settings, name=name, engine=engine, base=self._base)
        self._departures = Departures(engine)
        self._next_pool: str | None = None  # while the held jobs leave for another pool's turn
        self._has_left = True
        self._charged_at = self._keyless_until = 0.0
        self._loss: Loss | None = None
        self._held: dict[int, HeldJob] = {}
        self._unbooked: list[HeldJob] = []
        self._unrecorded: list[tuple[HeldJob, ProgressReport]] = []
        self._unpublished: Proof | None = None
        self._ungranted: dict[tuple[int, str], UrlsWanted] = {}  # by lease token and artifact
        self._version = str(read_version())
        self._serving = threading.Lock()
        self._turned_at = self._idle_since = self._jobless_since = time.monotonic()

    def request_stop(self) -> None:
        """Ask `serve` to give its jobs back and return. Safe from a signal's thread, and any number of times."""
        self._stop_requested.set()

    def describe(self) -> WorkerFacts:
        """Say what this worker holds now. Called from another thread than `serve`."""
        num_held = len(self._held)
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
            slots_in_use=(slots if self._is_trying else num_held) if pool else 0,
            pool_seconds=self._base.held_seconds,
            next_pool=self._next_pool,
            refusals=self._base.refusals,
            version=self._version,
            clock_offset_seconds=self._clock.offset_seconds,
            is_clock_wrong=self._clock.is_wrong,
        )

    @property
    def device_figures(self) -> DeviceFigures | None:
        """What the trainer last said of the device, if there is a trainer."""
        return self._base.figures

    @property
    def idle_seconds(self) -> float:
        """How long this worker has had nothing to do; 0 while it serves."""
        return 0.0 if self._serving.locked() else time.monotonic() - self._idle_since

    @property
    def is_turning(self) -> bool:
        """False when the loop serves, loads no base, and has not come round for as long as a trainer may stall.

        False also when jobs are held and nobody serves: their leases would be prolonged for ever.
        """
        if not self._serving.locked():
            return not self._held
        return self._base.is_loading or time.monotonic() - self._turned_at < self._settings.stall_seconds

    def has_claimable_work(self) -> bool:
        """Say whether there is a job to claim on a base that this worker may load. Raises the database's errors."""
        return self._clock.is_right() and self._has_waiting_work()

    def _has_waiting_work(self) -> bool:
        with service_transaction(self._engine) as session:
            loadable = self._loadable_bases(session)
            return any(pool in loadable for pool in claims.claimable_pools(session))

    def serve(self) -> None:
        """Work until none of this worker's pools has a claimable job and none is held. One caller at a time serves."""
        with self._serving:
            while not self._stop_requested.is_set():
                self._turned_at = time.monotonic()
                try:
                    if not self._turn():
                        break
                except DATABASE_ERRORS as error:
                    log.warning("database.unavailable", error=type(error).__name__)
                    self._stop_requested.wait(_AWAY_SECONDS)
            self._give_back_if_stopping()
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
            self._base.inspect_others()

    def leave_if_idle(self, seconds: float) -> bool:
        """Serve no more if no job was held for so long and none waits. Raises the database's errors.

        The lock keeps the answer true: nobody claims before it is given, and nobody serves after a yes. A base that
        took longer to load than a worker may idle is held for that time first. One whose clock is wrong stays too while
        jobs wait that it cannot claim: who leaves says that there is no work, and nobody would mend the clock.
        """
        if not self._serving.acquire(blocking=False):
            return False
        try:
            idle_seconds = min(time.monotonic() - self._jobless_since, self._base.held_seconds)
            if idle_seconds < seconds or self._has_waiting_work():
                return False
            self._stop_requested.set()
            return True
        finally:
            self._serving.release()

    def wait_until_idle(self) -> None:
        """Wait, after `request_stop`, until whoever serves has given its jobs back, for the grace at most."""
        if self._serving.acquire(timeout=self._settings.grace_seconds):
            self._serving.release()

    def close(self) -> None:
        self._base.close()
        self._departures.note_all()

    def _turn(self) -> bool:
        """Do what is due now. False when there is nothing left to do."""
        self._settle_loss()
        self._book_usage()
        self._charge_use()
        self._departures.record()
        if not self._held and not self._hold_pool_with_work() and not self._departures.are_due:
            return False
        self._lend_slot()
        self._fill_slots()
        self._start_held()
        if not self._held:  # the jobs that wait are not to be had now: by quota, or because others were quicker
            self._stop_requested.wait(_AWAY_SECONDS)
        self._advance()
        return True

    def _advance(self) -> None:
        try:
            self._take_reports()
            self._stop_stalled()  # with nothing left unheard, and before the database can take its time
        except TrainerGoneError as error:
            self._lose_trainer(explain_exit(error.exit_code))
        self._grant_wanted()
        self._record_progress()
        self._publish_proofs()
        self._heed_news()

    def _hold_pool_with_work(self) -> bool:
        if not self._clock.is_right():
            return False
        with service_transaction(self._engine) as session:
            bases = self._loadable_bases(session)
        pool = self._next_pool = self._turns.choose_pool(tuple(bases), promised=self._next_pool)
        if pool is None:
            return False
        if pool != self._base.pool or not self._base.is_alive:
            self._load(pool, bases[pool])
            if self._base.pool == pool:  # where it was refused at a first look, the old trainer lives on
                self._departures.note_all()
        self._next_pool = None
        return True

    def _load(self, pool: str, base: BaseModelRow) -> None:
        """Load a base that jobs wait for, and tell the first of them. What failed before is tried again in silence."""
        waiting: Sequence[uuid.UUID] = ()
        if not self._base.was_refused(pool):
            with contextlib.suppress(*DATABASE_ERRORS), service_transaction(self._engine) as session:
                waiting = announcements.announce_load(session, pool, base_model_id=base.id, num_jobs=base.slots)
        self._base.load(pool, base)
        if not waiting or self._stop_requested.is_set():
            return
        with contextlib.suppress(*DATABASE_ERRORS), service_transaction(self._engine) as session:
            if self._base.was_refused(pool):
                announcements.announce_unloaded(session, waiting, base_model_id=base.id)
            else:
                announcements.announce_loaded(session, waiting, seconds=self._base.load_seconds)

    def _loadable_bases(self, session: Session) -> dict[str, BaseModelRow]:
        """Return the bases, by pool, that this worker may try to load: also those that are served no more."""
        bases = {pool: base for base in list_known_base_models(session) for pool in pools_of(base)}
        own = [pool for pool in self._settings.worker_pools if pool in bases]
        return {pool: bases[pool] for pool in own if self._base.may_load(pool, bases[pool])}

    def _fill_slots(self) -> None:
        if self._has_room() and self._must_look() and self._ends_turn():
            return
        while self._has_room():
            started = time.monotonic()
            orders: list[StartJob] = []
            with CLAIM_SECONDS.time():
                job = self._claim_with_order(orders)
            if job is None:
                return
            reach(CrashPoint.POST_CLAIM)
            observe_wait(job, lease_seconds=self._settings.lease_seconds)
            self._hold(job, orders[-1], since=started)

    def _claim_with_order(self, orders: list[StartJob]) -> Job | None:
        """Claim a job and append what the trainer is to be sent. One whose order cannot be made is not claimed.

        An order names signed URLs. The keys to sign with are asked for here, where no transaction waits for the answer.
        """
        if time.monotonic() < self._keyless_until:
            return None
        try:
            self._store.renew_keys()
            with service_transaction(self._engine) as session:
                return self._claim(session, lambda job: orders.append(order_job(session, job, store=self._store)))
        except StorageUnavailableError as error:  # the claim is undone, and those that are held train on
            self._note_keyless(error)
            return None

    def _has_room(self) -> bool:
        return self._is_ready and not self._is_trying and len(self._held) < self._base.slots

    @property
    def _is_ready(self) -> bool:
        is_leaving = self._next_pool is not None or self._stop_requested.is_set()
        return self._base.is_held and self._loss is None and not is_leaving and self._clock.is_right()

    @property
    def _is_trying(self) -> bool:
        """Whether a job is tried alone."""
        return any(held.suspect_step is not None for held in tuple(self._held.values()))

    def _must_look(self) -> bool:
        """Say whether to ask whose turn it is before a claim: a slot came free, or nobody has asked for a while."""
        has_left, self._has_left = self._has_left, False
        return self._turns.is_over and (has_left or self._turns.is_due())

    def _ends_turn(self) -> bool:
        """Let the held jobs leave if another pool's turn has come, and say so."""
        if not self._turns.is_over:
            return False
        with service_transaction(self._engine) as session:
            bases = self._loadable_bases(session)
        # One that was refused lately is tried again by an idle worker only: it costs nobody a slot.
        pools = [pool for pool in bases if pool == self._base.pool or not self._base.was_refused(pool)]
        holders = [held.lease.tenant_id for held in self._held.values()]
        next_pool = self._turns.end(pools, holders=holders, held=tuple(self._held))
        if next_pool is None:
            return False
        log.info("pool.turn_ended", pool=self._base.pool, next_pool=next_pool, num_jobs=len(self._held))
        self._next_pool = next_pool
        for held in tuple(self._held.values()):
            self._yield(held)
        return True

    def _lend_slot(self) -> None:
        """Give a slot to a tenant that has used less and waits, if one of these slots has had its quantum."""
        wanting = [token for token, held in self._held.items() if held.wants_memory]
        if not self._is_ready or (self._has_room() and not wanting) or not self._turns.is_due():
            return
        if self._ends_turn() or any(held.is_yielding for held in self._held.values()):
            return
        loan = self._turns.lend(held=tuple(self._held), wanting=wanting)
        if loan is None:
            return
        log.info("slot.lent", lease_token=loan.lease_token)
        # Those that wait for memory too are admitted in the order in which they came: they leave, and come after it.
        leaving = [token for token in wanting if loan.borrower not in (None, token)]
        for token in (loan.lease_token, *leaving):
            self._yield(self._held[token])

    def _claim(self, session: Session, prepare: Callable[[Job], None] = lambda _job: None) -> Job | None:
        assert self._base.pool is not None
        return claims.claim_job(
            session,
            self._base.pool,
            worker_name=str(self._identity),
            lease_seconds=self._settings.lease_seconds,
            is_idle=not self._held,
            slot_seconds=slot_seconds(self._settings.quantum_seconds, slots=self._base.slots),
            prepare=prepare,
        )

    def _hold(self, job: Job, order: StartJob, *, since: float) -> None:
        lease = lease_of(job)
        self._keeper.hold(lease, since=since)
        self._departures.expect(lease)
        self._held[lease.token] = HeldJob(
            lease,
            job.pool,
            since,
            _trace(job, lease, since=since),
            result_filename(job),
            order,
            job.suspect_step,
            job.num_suspicions,
        )
        self._start_held()
        log.info("job.claimed", **ids_of(lease), pool=self._base.pool)

    def _start_held(self) -> None:
        """Hand the trainer what it was not handed yet; before a job that must be alone, the others are given back."""
        for held in tuple(self._held.values()):
            others = [other for other in self._held.values() if other is not held]
            if held.order is None:
                continue
            if held.suspect_step is not None and others:
                for other in others:
                    self._yield(other)
            else:
                self._base.send(held.order)
                held.order = None

    def _take_reports(self) -> None:
        report = self._base.receive(timeout_seconds=_POLL_SECONDS)
        for _ in range(_MAX_REPORTS):
            if report is None:
                return
            self._take(report)
            report = self._base.receive(timeout_seconds=0)
        if report is not None:
            self._take(report)

    def _take(self, report: Report) -> None:
        if isinstance(report, DeviceLeft):
            self._departures.note(report.lease_token)
        held = self._held.get(getattr(report, "lease_token", -1))
        if held is None:
            return
        match report:
            case (
                DatasetsRead()
                | JobStarted()
                | StepDone()
                | StepSkipped()
                | EvaluationDone()
                | JobWarned()
                | JobLogged()
            ):
                held.note_progress(report)
                self._unrecorded.append((held, report))
            case UrlsWanted():
                self._ungranted[report.lease_token, report.artifact] = report
            case UsageCounted():
                count_use(held.pool, held.usage, report)
                held.usage = report
            case PhaseDone():
                self._note_phase(held, report)
            case SlotRefused():
                held.wants_memory = True
            case CheckpointSaved() | ResumePointSaved():
                self._prover.submit(held.lease, report)
            case JobSucceeded() | JobFailed() | JobYielded():
                held.is_delivered = True
                self._prover.submit(held.lease, report)

    def _grant_wanted(self) -> None:
        """Answer who waits for URLs. While there are no keys to sign them with, the questions are kept."""
        if time.monotonic() < self._keyless_until:
            return
        try:
            for place, wanted in tuple(self._ungranted.items()):
                if (held := self._held.get(wanted.lease_token)) is not None:
                    artifact = wanted.artifact
                    urls = grant_uploads(self._store, held.lease, artifact=artifact, names=wanted.names)
                    self._base.send(UrlsGranted(lease_token=wanted.lease_token, artifact=artifact, urls=urls))
                del self._ungranted[place]
        except StorageUnavailableError as error:
            self._note_keyless(error)

    def _note_keyless(self, error: StorageUnavailableError) -> None:
        log.warning("storage.unavailable", error=str(error))
        self._keyless_until = time.monotonic() + _KEYLESS_SECONDS

    def _note_phase(self, held: HeldJob, done: PhaseDone) -> None:
        count_phase(done)
        attributes = {} if done.artifact is None else {"espalier.artifact": done.artifact}
        held.trace.add_phase(done.phase, began_at=done.began_at, seconds=done.seconds, attributes=attributes)

    def _record_progress(self) -> None:
        """Store what the jobs have done, all in one transaction: a step of many jobs costs one commit.

        Where one report cannot be stored, each is stored alone, and that one ends its attempt.
        """
        try:
            self._record(self._unrecorded)
        except ROW_ERRORS:
            self._record_one_by_one()
        self._unrecorded.clear()

    def _record_one_by_one(self) -> None:
        while self._unrecorded:
            held, _ = self._unrecorded[0]
            try:
                self._record(self._unrecorded[:1])
            except ROW_ERRORS as error:
                self._fail_unrecordable(held, error)
            self._unrecorded.pop(0)

    def _record(self, reports: Sequence[tuple[HeldJob, ProgressReport]]) -> None:
        if not reports:
            return
        spent: list[str] = []
        stale: set[int] = set()
        acquitted: dict[int, bool] = {}
        with service_transaction(self._engine) as session:
            for held, report in reports:
                token = held.lease.token
                try:
                    if token not in stale:
                        spent += record_progress(session, held.lease, report)
                        if token not in acquitted and held.is_acquitted_by(report):
                            acquitted[token] = attempts.acquit_job(session, held.lease)
                except StaleLeaseError:
                    stale.add(token)
        self._prover.delete_prefixes(tuple(spent))
        for token in stale:
            FENCED_WRITES.inc()
            self._lose_lease(self._held.get(token))
        for token, must_make_room in acquitted.items():
            self._acquit(self._held.get(token), must_make_room=must_make_room)

    def _acquit(self, held: HeldJob | None, *, must_make_room: bool) -> None:
        if held is not None:
            log.info("job.acquitted", **held.ids)
            held.suspect_step = None
            if must_make_room:
                self._yield(held)

    def _publish_proofs(self) -> None:
        while (proof := self._unpublished or self._prover.take()) is not None:
            self._unpublished = proof  # until the database has it
            self._publish(proof)
            self._unpublished = None

    def _publish(self, proof: Proof) -> None:
        held = self._held.get(proof.lease.token)
        if held is None:
            return
        try:
            if proof.error is not None:
                self._report_unproven(held, proof)
                return
            if isinstance(proof.report, JobSucceeded):
                reach(CrashPoint.PRE_FINISH)
            with service_transaction(self._engine) as session:
                spent = record_proof(session, proof, result_filename=held.result_filename)
            if isinstance(proof.report, JobSucceeded):
                reach(CrashPoint.POST_FINISH)
            self._prover.delete_prefixes(spent)
        except StaleLeaseError:
            FENCED_WRITES.inc()
            self._lose_lease(held)
            return
        except ROW_ERRORS as error:
            self._fail_unrecordable(held, error)
            return
        if isinstance(proof.report, JobSucceeded | JobFailed | JobYielded):
            log.info("job.left", **held.ids, reason=proof.report.kind)
            self._drop(held, outcome=_OUTCOMES[proof.report.kind])

    def _fail_unrecordable(self, held: HeldJob, error: Exception) -> None:
        """End an attempt whose report the database does not take. Where not even that is taken, its lease runs out."""
        log.error("report.unrecordable", **held.ids, error=type(error).__name__)
        with contextlib.suppress(StaleLeaseError, *ROW_ERRORS), service_transaction(self._engine) as session:
            attempts.fail_attempt(
                session, held.lease, code=UNRECORDABLE.code, message=UNRECORDABLE.message, is_job_fault=False
            )
        self._drop(held, outcome="failed")

    def _report_unproven(self, held: HeldJob, proof: Proof) -> None:
        log.warning("artifact.unconfirmed", **held.ids, error=str(proof.error))
        with service_transaction(self._engine) as session:
            if isinstance(proof.report, ResumePointSaved):
                message = f"The resume point of step {proof.report.step} could not be confirmed."
                attempts.record_message(session, held.lease, message=message, level="warn")
                return
            if isinstance(proof.error, StorageUnavailableError):
                attempts.postpone_attempt(session, held.lease, code=STORAGE_AWAY, message=UNCONFIRMED)
            else:
                attempts.fail_attempt(
                    session, held.lease, code=DAMAGED.code, message=DAMAGED.message, is_job_fault=False
                )
        self._drop(held, outcome="failed")

    def _heed_news(self) -> None:
        for news in self._keeper.take_news():
            held = self._held.get(news.lease.token)
            if news.is_lost:
                self._lose_lease(held)
            elif held is not None:
                self._yield(held)

    def _yield(self, held: HeldJob) -> None:
        if held.order is not None:
            self._requeue(held)
        elif not held.is_yielding:
            held.is_yielding = True
            self._base.send(YieldJob(lease_token=held.lease.token))

    def _requeue(self, held: HeldJob) -> None:
        """Give a job back without asking the trainer."""
        try:
            with service_transaction(self._engine) as session:
                attempts.requeue_attempt(session, held.lease)
        except StaleLeaseError:
            self._lose_lease(held)
            return
        self._drop(held, outcome="given_back")

    def _lose_lease(self, held: HeldJob | None) -> None:
        """Let go of a job whose lease is over. If it ran out, this worker was cut off and not lost, and says so."""
        if held is None:
            return
        with service_transaction(self._engine) as session:
            is_forgiven = attempts.uncount_lost_attempt(session, held.lease)
        log.info("lease.lost", **held.ids, is_forgiven=is_forgiven)
        self._drop(held, outcome="lease_lost")

    def _stop_stalled(self) -> None:
        if (self._held or self._departures.are_due) and not self._is_live():
            self._base.kill()
            self._lose_trainer(STALLED)

    def _is_live(self) -> bool:
        """Say whether the training loop has turned lately, as far as this process has looked."""
        return self._base.silent_seconds <= self._settings.stall_seconds

    def _lose_trainer(self, failure: Failure) -> None:
        num_jobs = sum(held.order is None and not held.is_delivered for held in self._held.values())
        failure = LEASE_LOST if self._keeper.is_fenced else failure
        log.error("trainer.lost", code=failure.code, num_jobs=num_jobs)
        TRAINERS_LOST.labels(failure.code).inc()
        self.close()
        self._loss = Loss(failure, is_shared=num_jobs > 1)

    def _settle_loss(self) -> None:
        """End the attempts that a lost trainer took with it; those whose result is stored already go on."""
        if self._loss is None:
            return
        for held in tuple(self._held.values()):
            if not held.is_delivered:
                self._end_lost(held, self._loss)
        self._loss = None

    def _end_lost(self, held: HeldJob, loss: Loss) -> None:
        code, message = loss.failure.code, loss.failure.message
        if loss.failure is LEASE_LOST or held.order is not None:
            self._requeue(held)
            return
        with contextlib.suppress(StaleLeaseError), service_transaction(self._engine) as session:
            if loss.is_shared:
                attempts.suspect_attempt(session, held.lease, code=code, message=message)
            else:
                is_final = loss.failure.is_final_alone
                attempts.fail_attempt(
                    session, held.lease, code=code, message=message, is_job_fault=is_final, is_suspect=True
                )
        self._drop(held, outcome="trainer_lost")

    def _drop(self, held: HeldJob | None, *, outcome: str) -> None:
        """Forget a job that has ended here, stop its training if it goes on, and book what it used."""
        if held is None or self._held.pop(held.lease.token, None) is None:
            return
        ATTEMPTS_ENDED.labels(held.pool, outcome).inc()
        held.trace.end(outcome)
        self._has_left = True
        self._jobless_since = time.monotonic()
        self._keeper.let_go(held.lease)
        self._base.send(StopJob(lease_token=held.lease.token))
        if held.order is not None:
            self._departures.note(held.lease.token)  # the trainer has never heard of it
        self._unbooked.append(held)
        try:
            self._book_usage()
        except DATABASE_ERRORS as error:  # it is tried again with the next turn
            log.warning("usage.unrecorded", **held.ids, error=type(error).__name__)

    def _charge_use(self) -> None:
        """Charge the tenants what their jobs have used, as often as leases are prolonged."""
        used = {token: held.usage.gpu_seconds for token, held in self._held.items() if held.usage is not None}
        if not used or time.monotonic() - self._charged_at < self._settings.heartbeat_seconds:
            return
        with service_transaction(self._engine) as session:
            charges.charge_use(session, used)
        self._charged_at = time.monotonic()

    def _book_usage(self) -> None:
        while self._unbooked:
            held = self._unbooked[0]
            try:
                self._book(held)
            except ROW_ERRORS as error:  # the schedule settles what was not booked
                log.error("usage.unrecordable", **held.ids, error=type(error).__name__)  # noqa: TRY400
            self._unbooked.pop(0)

    def _book(self, held: HeldJob) -> None:
        with service_transaction(self._engine) as session:
            charges.record_usage(
                session,
                held.lease.token,
                gpu_seconds=held.usage.gpu_seconds if held.usage else 0.0,
                trained_tokens=held.usage.trained_tokens if held.usage else 0,
            )

    def _give_back_if_stopping(self) -> None:
        if self._stop_requested.is_set():
            self._give_back()

    def _give_back(self) -> None:
        """Store every slot at its step boundary and queue the jobs again, all within the grace."""
        deadline = time.monotonic() + self._settings.grace_seconds
        while self._held and time.monotonic() < deadline:
            try:
                for held in tuple(self._held.values()):
                    self._yield(held)
                self._settle_loss()
                self._advance()
            except DATABASE_ERRORS as error:
                log.warning("database.unavailable", error=type(error).__name__)
                time.sleep(_AWAY_SECONDS)
        is_away = self._leave_the_rest()
        self.close()
        with contextlib.suppress(*DATABASE_ERRORS):
            if not is_away:
                self._departures.record()

    def _leave_the_rest(self) -> bool:
        """Queue again without its state what is still held, and return whether the database is away.

        One that is away is asked once: each question may take seconds, the grace is over, and leases run out.
        """
        is_away = False
        for held in tuple(self._held.values()):
            log.warning("job.left_without_state", **held.ids)
            try:
                if not is_away:
                    self._requeue(held)
            except DATABASE_ERRORS:
                is_away = True
            self._drop(held, outcome="given_back")
        return is_away


def _trace(job: Job, lease: Lease, *, since: float) -> AttemptTrace:
    """Begin the attempt's trace with its claim, which began at `since` by the monotonic clock."""
    seconds = time.monotonic() - since
    began_at = time.time() - seconds
    attributes = {f"espalier.{name}": value for name, value in ids_of(lease).items()} | {"espalier.pool": job.pool}
    trace = AttemptTrace(traceparent=job.traceparent, began_at=began_at, attributes=attributes)
    trace.add_phase("claim", began_at=began_at, seconds=seconds)
    return trace
