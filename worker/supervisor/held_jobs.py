"""The jobs that this worker holds: each from its claim until its attempt is over here, with its lease and its use.

Only `drop` removes a job: its lease is no longer prolonged, its training is stopped, and its use is booked once, when
the database accepts it. Orders to the trainer are sent from here, so that no job is trained beside one that must be
alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import structlog
from sqlalchemy import Engine

from core.db.models import Job
from core.db.session import DATABASE_ERRORS, service_transaction
from core.domain.ids import IdKind, format_id
from core.domain.jobs import is_acquitted
from core.domain.leases import Lease, StaleLeaseError
from core.services import attempts, charges
from core.services.set_asides import ROW_ERRORS
from core.telemetry.tracing import AttemptTrace
from worker.messages import JobStarted, StartJob, StepDone, StepSkipped, StopJob, UsageCounted, YieldJob
from worker.supervisor.artifacts import result_filename
from worker.supervisor.bases import BaseHolder
from worker.supervisor.departures import Departures
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.metrics import ATTEMPTS_ENDED, FIRST_STEP_SECONDS
from worker.supervisor.orders import lease_of
from worker.supervisor.records import ProgressReport

log = structlog.get_logger()


@dataclass(frozen=True)
class Claim:
    """A claimed job and the trainer's order for it. `began_at` is by the monotonic clock."""

    job: Job
    order: StartJob
    began_at: float


@dataclass
class HeldJob:
    """A claimed job. `usage` is the trainer's last count. `is_delivered`: only the proof of its end is missing.

    `order` is the order still to be sent to the trainer, and None once it is sent: a job that must be alone waits until
    the others have left. `claimed_at` is by the monotonic clock.
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

    @classmethod
    def of_claim(cls, claim: Claim) -> HeldJob:
        job, lease = claim.job, lease_of(claim.job)
        return cls(
            lease=lease,
            pool=job.pool,
            claimed_at=claim.began_at,
            trace=_trace(job, lease, since=claim.began_at),
            result_filename=result_filename(job),
            order=claim.order,
            suspect_step=job.suspect_step,
            num_suspicions=job.num_suspicions,
        )

    @property
    def ids(self) -> dict[str, str | int]:
        """The ids of this attempt in lines of the log."""
        return ids_of(self.lease)

    def note_progress(self, report: ProgressReport) -> None:
        """Note that the job has a slot, and how long its first step took to come."""
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


class HeldJobs:
    """Holds each job exactly as long as `keeper` prolongs its lease, and keeps its use until that is booked.

    Only the serving thread changes it. Any thread may iterate, count and ask.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        base: BaseHolder,
        keeper: LeaseKeeper,
        departures: Departures,
        charge_seconds: float,
    ) -> None:
        self._engine = engine
        self._base = base
        self._keeper = keeper
        self._departures = departures
        self._charge_seconds = charge_seconds
        self._charged_at = 0.0
        self._held: dict[int, HeldJob] = {}
        self._unbooked: list[HeldJob] = []
        self._has_one_left = True
        self._jobless_since = time.monotonic()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[HeldJob]:
        """Yield the jobs that are held now; those that leave meanwhile are still among them."""
        return iter(tuple(self._held.values()))

    @property
    def tokens(self) -> tuple[int, ...]:
        """The lease tokens of the jobs, in the order of their claims."""
        return tuple(self._held)

    @property
    def is_trying(self) -> bool:
        """Whether a job is tried alone."""
        return any(held.suspect_step is not None for held in self)

    @property
    def jobless_seconds(self) -> float:
        """How long ago the last job left."""
        return time.monotonic() - self._jobless_since

    def find(self, lease_token: int) -> HeldJob | None:
        return self._held.get(lease_token)

    def has_one_left(self) -> bool:
        """Say whether a job has left since the last call. The first call says yes."""
        has_one_left, self._has_one_left = self._has_one_left, False
        return has_one_left

    def hold(self, claim: Claim) -> None:
        held = HeldJob.of_claim(claim)
        self._keeper.hold(held.lease, since=claim.began_at)
        self._departures.expect(held.lease)
        self._held[held.lease.token] = held
        self.start_waiting()
        log.info("job.claimed", **held.ids, pool=self._base.pool)

    def start_waiting(self) -> None:
        """Send the trainer the orders not sent yet. Before a job that must be alone, the others leave."""
        for held in self:
            others = [other for other in self if other is not held]
            if held.order is None:
                continue
            if held.suspect_step is not None and others:
                for other in others:
                    self.give_back(other)
            else:
                self._base.send(held.order)
                held.order = None

    def give_back(self, held: HeldJob) -> None:
        """Let a job leave at its next step boundary. A job not yet sent to the trainer is queued again at once."""
        if held.order is not None:
            self.requeue(held)
        elif not held.is_yielding:
            held.is_yielding = True
            self._base.send(YieldJob(lease_token=held.lease.token))

    def give_all_back(self) -> None:
        for held in self:
            self.give_back(held)

    def requeue(self, held: HeldJob) -> None:
        """Queue a job again without asking the trainer."""
        try:
            with service_transaction(self._engine) as session:
                attempts.requeue_attempt(session, held.lease)
        except StaleLeaseError:
            self.lose_lease(held)
            return
        self.drop(held, outcome="given_back")

    def lose_lease(self, held: HeldJob | None) -> None:
        """Drop a job whose lease is over. If it ran out, this worker was cut off but not lost, and records that."""
        if held is None:
            return
        with service_transaction(self._engine) as session:
            is_forgiven = attempts.uncount_lost_attempt(session, held.lease)
        log.info("lease.lost", **held.ids, is_forgiven=is_forgiven)
        self.drop(held, outcome="lease_lost")

    def heed_news(self) -> None:
        """Drop the jobs whose leases the heartbeats found lost, and give back the jobs that are to pause."""
        for news in self._keeper.take_news():
            held = self._held.get(news.lease.token)
            if news.is_lost:
                self.lose_lease(held)
            elif held is not None:
                self.give_back(held)

    def drop(self, held: HeldJob | None, *, outcome: str) -> None:
        """Forget a job that has ended here, stop its training if it continues, and book its use."""
        if held is None or self._held.pop(held.lease.token, None) is None:
            return
        ATTEMPTS_ENDED.labels(held.pool, outcome).inc()
        held.trace.end(outcome)
        self._has_one_left = True
        self._jobless_since = time.monotonic()
        # From here on this worker neither prolongs its lease nor trains for it, whether the database knows it or not.
        self._keeper.let_go(held.lease)
        self._base.send(StopJob(lease_token=held.lease.token))
        if held.order is not None:
            self._departures.note(held.lease.token)  # the trainer never got this job
        self._unbooked.append(held)
        try:
            self.book_usage()
        except DATABASE_ERRORS as error:  # the next round of the loop tries it again
            log.warning("usage.unrecorded", **held.ids, error=type(error).__name__)

    def charge_use(self) -> None:
        """Charge the tenants for the use of their jobs, as often as leases are prolonged."""
        used = {token: held.usage.gpu_seconds for token, held in self._held.items() if held.usage is not None}
        if not used or time.monotonic() - self._charged_at < self._charge_seconds:
            return
        with service_transaction(self._engine) as session:
            charges.charge_use(session, used)
        self._charged_at = time.monotonic()

    def book_usage(self) -> None:
        """Book the use of the jobs that have left. Raises the database's errors; what is not booked is then kept."""
        while self._unbooked:
            held = self._unbooked[0]  # it stays the first until it is booked, however often the database is away
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


def _trace(job: Job, lease: Lease, *, since: float) -> AttemptTrace:
    """Start the attempt's trace with its claim, which began at `since` by the monotonic clock."""
    seconds = time.monotonic() - since
    began_at = time.time() - seconds
    attributes = {f"espalier.{name}": value for name, value in ids_of(lease).items()} | {"espalier.pool": job.pool}
    trace = AttemptTrace(traceparent=job.traceparent, began_at=began_at, attributes=attributes)
    trace.add_phase("claim", began_at=began_at, seconds=seconds)
    return trace
