"""Why a queued job waits and when its turn may come: rules over counts, without any tenant's name.

The fair order (core.domain.scheduling) serves the tenant with the least usage per weight and charges every claim with
an estimate. A job's place in it follows in closed form from each tenant's score, weight and number of waiting jobs; the
database counts, because only it may see across tenants, and answers with sums.
"""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from enum import StrEnum

from core.domain.jobs import AttemptOutcome
from core.domain.progress import Interval


class WaitCode(StrEnum):
    """Why a job is not running. Public and stable."""

    PAUSED = "paused"
    RETRY_BACKOFF = "retry_backoff"
    TENANT_DISABLED = "tenant_disabled"
    BASE_UNUSABLE = "base_unusable"
    TENANT_CONCURRENCY = "tenant_concurrency"
    QUOTA = "quota"
    NO_WORKER = "no_worker"
    BASE_LOADING = "base_loading"
    PREEMPTED = "preempted"
    NO_FREE_SLOT = "no_free_slot"
    STARTING = "starting"


@dataclass(frozen=True)
class PoolWorkers:
    """The workers alive that can serve a pool. `num_serving` hold its base, `num_elsewhere` are busy with another.

    `num_unfit` more are alive and cannot load the base at present, for want of memory or the like.
    `last_seen_at` is the newest heartbeat of any worker of the pool, alive or not.
    """

    num_alive: int
    num_serving: int
    num_loading: int
    num_elsewhere: int
    slots: int
    slots_in_use: int
    last_seen_at: dt.datetime | None
    num_unfit: int = 0

    @property
    def free_slots(self) -> int:
        return max(0, self.slots - self.slots_in_use)


@dataclass(frozen=True)
class PoolQueue:
    """What waits in a pool. `num_ahead` jobs come before this one in the fair order.

    `share_now` is the tenant's part of the recent usage of those who wait or run in the pool, `share_entitled` its part
    of their weights. `job_seconds` and `step_seconds` are what recent jobs of the pool took, from quick to slow ones.
    """

    num_waiting: int
    num_ahead: int
    share_now: float
    share_entitled: float
    num_measured: int
    job_seconds: tuple[float, float] | None
    step_seconds: tuple[float, float] | None


@dataclass(frozen=True)
class TenantState:
    num_running: int
    max_running: int
    is_disabled: bool
    is_within_gpu_quota: bool = True


@dataclass(frozen=True)
class WaitingJob:
    is_paused: bool
    run_after: dt.datetime
    total_steps: int
    last_outcome: str | None
    is_base_unusable: bool = False


@dataclass(frozen=True)
class Reason:
    code: WaitCode
    sentence: str


def explain_wait(
    job: WaitingJob, *, tenant: TenantState, workers: PoolWorkers, queue: PoolQueue, now: dt.datetime
) -> Reason:
    """Return the one thing that must change first for the job to start."""
    if job.is_paused:
        return Reason(WaitCode.PAUSED, "The job is paused; resume it to queue it again.")
    if held := _explain_hold(job, tenant):
        return held
    if job.run_after > now:
        seconds = math.ceil((job.run_after - now).total_seconds())
        return Reason(WaitCode.RETRY_BACKOFF, f"The last attempt failed; the next may start in {seconds} s.")
    if not tenant.is_within_gpu_quota:
        sentence = (
            "Your organization has used its GPU-seconds of this month; its jobs go on when the month (UTC) turns."
        )
        return Reason(WaitCode.QUOTA, sentence)
    if tenant.num_running >= tenant.max_running:
        sentence = f"{tenant.num_running} of your jobs are running and {tenant.max_running} may run at a time."
        return Reason(WaitCode.TENANT_CONCURRENCY, sentence)
    return _explain_workers(job, workers, queue, now)


def _explain_hold(job: WaitingJob, tenant: TenantState) -> Reason | None:
    """Return what the operator alone can change."""
    if tenant.is_disabled:
        return Reason(WaitCode.TENANT_DISABLED, "The operator has disabled this organization; its jobs are held.")
    if job.is_base_unusable:
        sentence = "Its base model cannot be loaded; the operator has to mend it. The job waits, and loses no attempt."
        return Reason(WaitCode.BASE_UNUSABLE, sentence)
    return None


def _explain_workers(job: WaitingJob, workers: PoolWorkers, queue: PoolQueue, now: dt.datetime) -> Reason:
    if not workers.num_alive:
        return Reason(WaitCode.NO_WORKER, _describe_absence(workers, now))
    if not workers.num_serving:
        if workers.num_loading or workers.num_elsewhere < workers.num_alive:
            return Reason(WaitCode.BASE_LOADING, "A worker is loading this base model, or is about to.")
        sentence = f"All {workers.num_alive} workers that may serve this base model are busy with another one."
        return Reason(WaitCode.NO_FREE_SLOT, sentence)
    if queue.num_ahead < workers.free_slots:
        return Reason(WaitCode.STARTING, "It is this job's turn: a worker takes it at its next step.")
    sentence = f"{workers.slots_in_use} of {workers.slots} slots are in use, and {queue.num_ahead} jobs come first."
    if job.last_outcome == AttemptOutcome.PREEMPTED:
        return Reason(WaitCode.PREEMPTED, f"Its worker had to stop and gave it back. {sentence}")
    return Reason(WaitCode.NO_FREE_SLOT, sentence)


def _describe_absence(workers: PoolWorkers, now: dt.datetime) -> str:
    if workers.num_unfit:
        told = f"{workers.num_unfit} workers that may serve this base model are alive, and none can load it at present."
        return f"{told} They try again; the operator can see why."
    seen = "none has been seen yet"
    if workers.last_seen_at is not None:
        seen = f"the last was heard of {math.ceil((now - workers.last_seen_at).total_seconds())} s ago"
    return f"No worker that may serve this base model is alive; {seen}."


def estimate_wait(
    job: WaitingJob, *, reason: Reason, workers: PoolWorkers, queue: PoolQueue, now: dt.datetime
) -> Interval | None:
    """Return when the job may end, from its place and what recent jobs of the pool took; None where nothing says.

    Jobs ahead leave the slots in waves: the quick bound is waves of quick jobs, the slow one of slow jobs and one wave
    more, because nobody knows how far those that run now have come.
    """
    unknowable = (
        WaitCode.PAUSED,
        WaitCode.TENANT_DISABLED,
        WaitCode.BASE_UNUSABLE,
        WaitCode.QUOTA,
        WaitCode.TENANT_CONCURRENCY,
        WaitCode.NO_WORKER,
    )
    if reason.code in unknowable or queue.job_seconds is None or queue.step_seconds is None or not workers.slots:
        return None
    to_leave = max(0, queue.num_ahead + 1 - workers.free_slots)
    waves = math.ceil(to_leave / workers.slots)
    quick = max(0, waves - 1) * queue.job_seconds[0] + job.total_steps * queue.step_seconds[0]
    slow = waves * queue.job_seconds[1] + job.total_steps * queue.step_seconds[1]
    begin = max(now, job.run_after)
    return Interval(begin + dt.timedelta(seconds=quick), begin + dt.timedelta(seconds=slow))
