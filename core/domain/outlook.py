"""Why a queued job waits and when it may start: rules over counts, without the name of any tenant.

`explain_wait` returns the first reason that applies:

| condition, in this order | code |
|---|---|
| the job is paused | `paused` |
| its tenant is disabled | `tenant_disabled` |
| its base is unusable | `base_unusable` |
| the job is set aside | `unclaimable` |
| it waits after a failed attempt | `retry_backoff` |
| the GPU-seconds of the month are used up | `quota` |
| the tenant stores more than it may | `storage_quota` |
| as many of its jobs run as may | `tenant_concurrency` |
| no worker can take it, and some have wrong clocks | `clock_wrong` |
| no worker can take it, otherwise | `no_worker` |
| no worker holds the base, and one loads it or is free to | `base_loading` |
| no worker holds the base: all are busy with others | `other_base_turn` |
| fewer jobs come first than there are free slots | `starting` |
| no slot is free for it, and its last attempt was preempted | `preempted` |
| the same, and its last attempt lent the slot | `slot_lent` |
| the same, otherwise | `no_free_slot` |

The fair order (core.domain.scheduling) serves the tenant with the least usage per weight and charges every claim with
an estimate. So a job's place follows in closed form from each tenant's score, weight and number of waiting jobs. The
database computes it, because only the database may read all tenants, and returns sums.
"""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from enum import StrEnum

from core.domain.jobs import AttemptOutcome
from core.domain.progress import Interval
from core.domain.scheduling import QUANTUM_SECONDS


class WaitCode(StrEnum):
    """Why a job is not running, or will not be soon. Public and stable.

    - `paused`: The job is paused until it is resumed.
    - `pausing`: The job runs until its worker has stored where it stands, and is paused then.
    - `retry_backoff`: The last attempt failed, and the next waits a moment.
    - `tenant_disabled`: The operator has disabled the organization.
    - `base_unusable`: The base model cannot be loaded until the operator mends it.
    - `tenant_concurrency`: As many of the organization's jobs run as may.
    - `unclaimable`: The service cannot read the job as it is stored, and tries again later.
    - `quota`: The organization has used its GPU-seconds of this month.
    - `storage_quota`: The organization stores more than it may.
    - `no_worker`: No worker that may serve the base model is alive, or none can load it at present.
    - `clock_wrong`: The workers that could take the job have hosts whose clocks are wrong.
    - `base_loading`: A worker loads the base model, or is about to.
    - `other_base_turn`: All workers that may serve the base model have a turn of another one.
    - `preempted`: The job's worker had to stop and gave the job back, and no slot is free yet.
    - `slot_lent`: The job's slot is lent to an organization that has used less.
    - `no_free_slot`: Every slot is in use, or goes to jobs that come first.
    - `starting`: It is the job's turn, and a worker takes it at its next step.
    """

    PAUSED = "paused"
    PAUSING = "pausing"
    RETRY_BACKOFF = "retry_backoff"
    TENANT_DISABLED = "tenant_disabled"
    BASE_UNUSABLE = "base_unusable"
    TENANT_CONCURRENCY = "tenant_concurrency"
    UNCLAIMABLE = "unclaimable"
    QUOTA = "quota"
    STORAGE_QUOTA = "storage_quota"
    NO_WORKER = "no_worker"
    CLOCK_WRONG = "clock_wrong"
    BASE_LOADING = "base_loading"
    OTHER_BASE_TURN = "other_base_turn"
    PREEMPTED = "preempted"
    SLOT_LENT = "slot_lent"
    NO_FREE_SLOT = "no_free_slot"
    STARTING = "starting"


# No measurement says how long these reasons last.
_UNKNOWABLE = (
    WaitCode.PAUSED,
    WaitCode.TENANT_DISABLED,
    WaitCode.BASE_UNUSABLE,
    WaitCode.UNCLAIMABLE,
    WaitCode.QUOTA,
    WaitCode.STORAGE_QUOTA,
    WaitCode.TENANT_CONCURRENCY,
    WaitCode.NO_WORKER,
    WaitCode.CLOCK_WRONG,
)


@dataclass(frozen=True)
class PoolWorkers:
    """The workers alive that can serve a pool. `num_serving` hold its base, `num_elsewhere` are busy with another.

    Not among them are `num_unfit`, which cannot load the base at present, for lack of memory or the like, and
    `num_clock_wrong`, which claim nothing because the clocks of their hosts are wrong. `last_seen_at` is the newest
    heartbeat of any worker of the pool, alive or not. The first worker of those elsewhere may end its turn in
    `turn_left_seconds`.
    """

    num_alive: int
    num_serving: int
    num_loading: int
    num_elsewhere: int
    slots: int
    slots_in_use: int
    last_seen_at: dt.datetime | None
    num_unfit: int = 0
    turn_left_seconds: float | None = None
    num_clock_wrong: int = 0

    @property
    def free_slots(self) -> int:
        return max(0, self.slots - self.slots_in_use)


@dataclass(frozen=True)
class PoolQueue:
    """What waits and runs in a pool. `num_ahead` jobs come before this one in the fair order.

    `num_rivals` are other tenants' waiting jobs; `is_fairest` says that no tenant here has a lower score. `share_now`
    is the tenant's part of the recent usage of all who wait or run in the pool, `share_entitled` its part of their
    weights. `job_seconds` and `step_seconds` are what recent jobs of the pool took, from quick to slow ones.
    `leave_seconds` are the earliest and the latest time until this job's slot is free; the latest is None if no
    measurement bounds it. `load_seconds` is how long the last load of the base took.
    """

    num_waiting: int
    num_ahead: int
    share_now: float
    share_entitled: float
    num_measured: int
    job_seconds: tuple[float, float] | None
    step_seconds: tuple[float, float] | None
    num_running: int = 0
    num_rivals: int = 0
    is_fairest: bool = True
    leave_seconds: tuple[float, float | None] = (0.0, 0.0)
    load_seconds: float | None = None


@dataclass(frozen=True)
class TenantState:
    num_running: int
    max_running: int
    is_disabled: bool
    is_within_gpu_quota: bool = True
    is_within_storage_quota: bool = True


@dataclass(frozen=True)
class WaitingJob:
    """A job that waits. `set_aside_until` is set if a worker could not start the job as it is stored."""

    is_paused: bool
    run_after: dt.datetime
    total_steps: int
    last_outcome: str | None
    set_aside_until: dt.datetime | None = None
    is_base_unusable: bool = False


@dataclass(frozen=True)
class Reason:
    code: WaitCode
    sentence: str


PAUSING = Reason(
    WaitCode.PAUSING,
    "The job runs until its worker has stored where it stands, and is paused then; resume it to go on.",
)


def explain_wait(
    job: WaitingJob, *, tenant: TenantState, workers: PoolWorkers, queue: PoolQueue, now: dt.datetime
) -> Reason:
    """Return the one thing that must change first for the job to start."""
    if job.is_paused:
        return Reason(WaitCode.PAUSED, "The job is paused; resume it to queue it again.")
    held = _explain_hold(job, tenant) or _explain_rest(job, now) or _explain_quotas(tenant)
    return held or _explain_workers(job, workers, queue, now)


def _explain_rest(job: WaitingJob, now: dt.datetime) -> Reason | None:
    if job.set_aside_until is not None:
        seconds = math.ceil((job.set_aside_until - now).total_seconds())
        sentence = f"The service cannot read this job, and its operator is told; it is tried again in {seconds} s."
        return Reason(WaitCode.UNCLAIMABLE, sentence)
    if job.run_after > now:
        seconds = math.ceil((job.run_after - now).total_seconds())
        return Reason(WaitCode.RETRY_BACKOFF, f"The last attempt failed; the next may start in {seconds} s.")
    return None


def _explain_quotas(tenant: TenantState) -> Reason | None:
    if not tenant.is_within_gpu_quota:
        sentence = (
            "Your organization has used its GPU-seconds of this month; its jobs go on when the month (UTC) turns."
        )
        return Reason(WaitCode.QUOTA, sentence)
    if not tenant.is_within_storage_quota:
        sentence = "Your organization stores more than it may; its jobs start when it has deleted enough."
        return Reason(WaitCode.STORAGE_QUOTA, sentence)
    if tenant.num_running >= tenant.max_running:
        sentence = f"{tenant.num_running} of your jobs are running and {tenant.max_running} may run at a time."
        return Reason(WaitCode.TENANT_CONCURRENCY, sentence)
    return None


def _explain_hold(job: WaitingJob, tenant: TenantState) -> Reason | None:
    """Return a reason that only the operator can remove."""
    if tenant.is_disabled:
        return Reason(WaitCode.TENANT_DISABLED, "The operator has disabled this organization; its jobs are held.")
    if job.is_base_unusable:
        sentence = "Its base model cannot be loaded; the operator has to mend it. The job waits, and loses no attempt."
        return Reason(WaitCode.BASE_UNUSABLE, sentence)
    return None


def _explain_workers(job: WaitingJob, workers: PoolWorkers, queue: PoolQueue, now: dt.datetime) -> Reason:
    if not workers.num_alive and workers.num_clock_wrong:
        told = f"The clocks of {workers.num_clock_wrong} workers that may serve this base model are wrong, and no other"
        return Reason(WaitCode.CLOCK_WRONG, f"{told} can take the job. They go on once the operator has set them.")
    if not workers.num_alive:
        return Reason(WaitCode.NO_WORKER, _describe_absence(workers, now))
    if not workers.num_serving:
        if workers.num_loading or workers.num_elsewhere < workers.num_alive:
            return Reason(WaitCode.BASE_LOADING, "A worker is loading this base model, or is about to.")
        return Reason(WaitCode.OTHER_BASE_TURN, _describe_turn(workers))
    if queue.num_ahead < workers.free_slots:
        return Reason(WaitCode.STARTING, "It is this job's turn: a worker takes it at its next step.")
    return _explain_slots(job, workers, queue)


def _explain_slots(job: WaitingJob, workers: PoolWorkers, queue: PoolQueue) -> Reason:
    sentence = f"{workers.slots_in_use} of {workers.slots} slots are in use, and {queue.num_ahead} jobs come first."
    if job.last_outcome == AttemptOutcome.PREEMPTED:
        return Reason(WaitCode.PREEMPTED, f"Its worker had to stop and gave it back. {sentence}")
    if job.last_outcome == AttemptOutcome.LENT:
        lent = "Its slot is lent to an organization that has used less; the job goes on from where it stands."
        return Reason(WaitCode.SLOT_LENT, f"{lent} {sentence}")
    return Reason(WaitCode.NO_FREE_SLOT, sentence)


def _describe_turn(workers: PoolWorkers) -> str:
    sentence = f"All {workers.num_alive} workers that may serve this base model have a turn of another one."
    if not workers.turn_left_seconds:
        return f"{sentence} The next turn is this base's when its jobs come first."
    minutes = math.ceil(workers.turn_left_seconds / 60)
    return f"{sentence} The first turn ends in {minutes} min if jobs of this base come first then."


def _describe_absence(workers: PoolWorkers, now: dt.datetime) -> str:
    if workers.num_unfit:
        told = f"{workers.num_unfit} workers that may serve this base model are alive, and none can load it at present."
        return f"{told} They try again; the operator can see why."
    seen = "none has been seen yet"
    if workers.last_seen_at is not None:
        seen = f"the last was heard of {math.ceil((now - workers.last_seen_at).total_seconds())} s ago"
    return f"No worker that may serve this base model is alive; {seen}."


def estimate_wait(
    job: WaitingJob,
    *,
    reason: Reason,
    workers: PoolWorkers,
    queue: PoolQueue,
    now: dt.datetime,
    quantum_seconds: float = QUANTUM_SECONDS,
) -> Interval | None:
    """Return when the job may end, or None where no honest estimate is possible.

    The job begins when a slot is free for it: when a running job ends, by its remaining steps, or lends its slot. If no
    worker holds the base, a turn must end and the base must be loaded first. Then the job takes its own steps. There is
    no estimate for a job whose slot may be lent while it runs.
    """
    if reason.code in _UNKNOWABLE or queue.job_seconds is None or queue.step_seconds is None:
        return None
    wait = _wait_for_slot(workers, queue) if workers.num_serving else _wait_for_base(workers, queue)
    quick, slow = (job.total_steps * seconds for seconds in queue.step_seconds)
    if wait is None or (queue.num_rivals and slow > quantum_seconds):
        return None
    begin = max(now, job.run_after)
    return Interval(begin + dt.timedelta(seconds=wait[0] + quick), begin + dt.timedelta(seconds=wait[1] + slow))


def _wait_for_slot(workers: PoolWorkers, queue: PoolQueue) -> tuple[float, float] | None:
    """Return the bounds of the wait if the base is held. Jobs beyond those that run now leave in waves."""
    quick, slow = queue.leave_seconds
    if slow is None or queue.job_seconds is None:
        return None
    to_leave = max(0, queue.num_ahead + 1 - workers.free_slots)
    waves = math.ceil(max(0, to_leave - queue.num_running) / max(1, workers.slots))
    return quick + waves * queue.job_seconds[0], slow + waves * queue.job_seconds[1]


def _wait_for_base(workers: PoolWorkers, queue: PoolQueue) -> tuple[float, float] | None:
    """Return the bounds of the wait if no worker holds the base: for the end of a turn, if needed, and for the load."""
    if queue.load_seconds is None or queue.num_ahead:
        return None
    if workers.num_loading:
        return 0.0, queue.load_seconds
    if workers.num_elsewhere < workers.num_alive:
        return queue.load_seconds, queue.load_seconds
    if workers.turn_left_seconds is None or not queue.is_fairest:
        return None
    return queue.load_seconds, workers.turn_left_seconds + queue.load_seconds
