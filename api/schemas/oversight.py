"""What operators see of jobs, workers, pools and usage. Times are Unix seconds."""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from api.schemas.wire import Answer, optional_seconds, unix_seconds
from core.domain.bases import BaseState
from core.domain.ids import IdKind, format_id
from core.domain.jobs import JobStatus
from core.domain.training import Quantization
from core.services.oversight import JobOverview, PoolDemand, PoolOverview, WorkerOverview
from core.services.usage import UsageGroup, UsageTotal


def _check_day(value: Any) -> Any:
    """Pass days such as 2026-11-27. Refuse numbers, which pydantic would read as days too."""
    if isinstance(value, str) and value.isdigit():
        raise ValueError("a day is written as 2026-11-27")
    return value


Day = Annotated[dt.date, BeforeValidator(_check_day)]


class JobOverviewObject(Answer):
    """A job of any tenant. It holds no name that a tenant has chosen but the slug."""

    id: str
    """The job's id, which begins with `ftjob-`."""
    object: Literal["job"] = "job"
    """The kind of this object."""
    tenant: str
    """The tenant's slug."""
    pool: str
    """The pool that serves the job: its base model and quantization."""
    base_model: str
    """The base model that the job trains against."""
    quantization: Quantization | None
    """The quantization of the base in training. Null for full precision."""
    status: JobStatus
    """Where the job is in its life."""
    is_pausing: bool
    """Whether a pause was asked for. The job runs until its worker has stored where it stands."""
    priority: int
    """The job's rank among the tenant's own jobs: a higher one starts first."""
    trained_steps: int
    """The number of optimizer steps done."""
    total_steps: int
    """The number of optimizer steps of the whole job."""
    trained_tokens: int | None
    """The number of tokens that the job was trained on. Null until it has succeeded."""
    attempts: int
    """The number of attempts that count towards `max_attempts`."""
    max_attempts: int
    """The number of attempts after which the job fails."""
    error_code: str | None
    """Why the job has failed, without the words that are the tenant's. Null if it has not."""
    worker: str | None
    """The worker of the attempt that runs. Null if none runs."""
    used_seconds: float | None
    """The GPU-seconds of the attempt that runs. Null if none runs."""
    created_at: int
    """When the job was submitted, in Unix seconds."""
    run_after: int
    """When the job's next attempt may start, in Unix seconds."""
    started_at: int | None
    """When the job's first attempt began, in Unix seconds. Null if there was none."""
    finished_at: int | None
    """When the job succeeded, failed or was cancelled, in Unix seconds. Null until then."""

    @classmethod
    def of(cls, job: JobOverview) -> JobOverviewObject:
        same = (
            "tenant",
            "pool",
            "quantization",
            "status",
            "priority",
            "trained_steps",
            "total_steps",
            "trained_tokens",
        )
        return cls(
            id=format_id(IdKind.JOB, job.id),
            base_model=job.base_model_id,
            is_pausing=job.pause_requested_at is not None,
            attempts=job.attempt_count,
            max_attempts=job.max_attempts,
            error_code=job.error_code,
            worker=job.worker_name,
            used_seconds=job.used_seconds,
            created_at=unix_seconds(job.created_at),
            run_after=unix_seconds(job.run_after),
            started_at=optional_seconds(job.started_at),
            finished_at=optional_seconds(job.finished_at),
            **{name: getattr(job, name) for name in same},
        )


class WorkerObject(Answer):
    """A worker as it said of itself at its last heartbeat."""

    id: str
    """The worker's identity, `name:pid:boot`. Two processes of one name are two workers."""
    object: Literal["worker"] = "worker"
    """The kind of this object."""
    name: str
    """What the worker is called. Several may share it."""
    version: str | None
    """The version of the service that it runs. Null for a version that does not say so."""
    state: Literal["idle", "loading", "serving", "stopping", "clock_wrong"]
    """What it does.

    - `idle`: It trains no job.
    - `loading`: It loads a base.
    - `serving`: It trains jobs.
    - `stopping`: It ends: it gives its jobs back and claims no more.
    - `clock_wrong`: Its host's clock is more than 30 s off the database's, so that it claims nothing.
    """
    clock_offset_seconds: float | None
    """How many seconds its host's clock is ahead of the database's. Null if it has not measured."""
    is_alive: bool
    """False once it has missed three heartbeats."""
    is_draining: bool
    """Whether it ends: it gives its jobs back and claims no more."""
    pools: list[str]
    """The pools that it may serve."""
    pool: str | None
    """The pool whose base it holds or loads. Null if there is none."""
    next_pool: str | None
    """The pool whose base it is about to load instead. Null if there is none."""
    slots: int
    """The number of jobs that it can train at a time."""
    slots_in_use: int
    """The number of jobs that it trains now."""
    refusals: dict[str, str]
    """Why it cannot load the bases of some pools, by pool."""
    started_at: int
    """When the worker began, in Unix seconds."""
    heartbeat_at: int
    """When its last heartbeat came, in Unix seconds."""

    @classmethod
    def of(cls, worker: WorkerOverview) -> WorkerObject:
        same = ("version", "is_alive", "is_draining", "pool", "next_pool", "slots", "slots_in_use", "refusals")
        return cls(
            id=worker.name,
            name=worker.given_name,
            state=worker.shown_state,
            clock_offset_seconds=worker.clock_offset_seconds,
            pools=list(worker.pools),
            started_at=unix_seconds(worker.started_at),
            heartbeat_at=unix_seconds(worker.heartbeat_at),
            **{name: getattr(worker, name) for name in same},
        )


class PoolDemandObject(Answer):
    """How many workers the jobs of a pool would fill now."""

    id: str
    """The pool's name."""
    object: Literal["pool.demand"] = "pool.demand"
    """The kind of this object."""
    num_claimable: int
    """The queued jobs that a worker would be given now."""
    num_running: int
    """The jobs that run."""
    num_slots: int
    """The jobs that one worker of the pool trains at a time."""
    workers_wanted: int
    """(num_claimable + num_running) / num_slots, rounded up."""

    @classmethod
    def of(cls, demand: PoolDemand) -> PoolDemandObject:
        return cls(
            id=demand.pool,
            num_claimable=demand.num_claimable,
            num_running=demand.num_running,
            num_slots=demand.num_slots,
            workers_wanted=demand.workers_wanted,
        )


class PoolObject(Answer):
    """A pool: what waits in it, what runs, who serves it, and whether its base can be used."""

    id: str
    """The pool's name."""
    object: Literal["pool"] = "pool"
    """The kind of this object."""
    base_model: str
    """The pool's base model."""
    quantization: Quantization | None
    """The quantization of the base. Null for full precision."""
    base_state: BaseState
    """Whether a worker could load the base."""
    base_state_reason: str | None
    """Why the base cannot be loaded. Null if it can, or if nobody has tried."""
    is_offered: bool
    """Whether new jobs are taken."""
    num_queued: int
    """All queued jobs, those that may not start yet included."""
    oldest_queued_seconds: float | None
    """How many seconds ago the oldest queued job was submitted. Null if none is queued."""
    num_claimable: int
    """The queued jobs that a worker would be given now."""
    num_running: int
    """The jobs that run."""
    num_slots: int
    """The jobs that one worker of the pool trains at a time."""
    workers_wanted: int
    """The number of workers that the claimable and the running jobs would fill."""
    num_workers: int
    """The workers alive that may serve the pool."""
    num_holding: int
    """The workers among them that hold its base."""
    num_refusing: int
    """The workers among them that cannot load its base."""
    slots_in_use: int
    """The jobs that these workers train now."""

    @classmethod
    def of(cls, pool: PoolOverview) -> PoolObject:
        counts = ("num_queued", "num_workers", "num_holding", "num_refusing", "slots_in_use")
        demand = PoolDemandObject.of(pool.demand).model_dump(exclude={"object"})
        return cls(
            base_model=pool.base_model_id,
            quantization=pool.quantization,
            base_state=pool.base_state,
            base_state_reason=pool.state_reason,
            is_offered=pool.is_offered,
            oldest_queued_seconds=pool.oldest_seconds,
            **demand,
            **{name: getattr(pool, name) for name in counts},
        )


class UsageObject(Answer):
    """What a tenant, a pool or a day (UTC) has used: attempts that have ended."""

    id: str
    """The tenant's slug, the pool's name, or the day, such as `2026-11-27`."""
    object: Literal["usage"] = "usage"
    """The kind of this object."""
    group_by: UsageGroup
    """What `id` names."""
    gpu_seconds: float
    """The GPU-seconds used."""
    trained_tokens: int
    """The number of tokens trained on."""
    num_jobs: int
    """The number of jobs that had attempts."""
    num_attempts: int
    """The number of attempts."""

    @classmethod
    def of(cls, total: UsageTotal, group: UsageGroup) -> UsageObject:
        return cls(
            id=total.label,
            group_by=group,
            gpu_seconds=total.gpu_seconds,
            trained_tokens=total.trained_tokens,
            num_jobs=total.num_jobs,
            num_attempts=total.num_attempts,
        )


def usage_csv(group: UsageGroup, totals: Iterable[UsageTotal]) -> str:
    """Return totals as CSV (RFC 4180) with a header. The first column has the name of the group."""
    written = io.StringIO()
    rows = csv.writer(written)
    rows.writerow([group, "gpu_seconds", "trained_tokens", "num_jobs", "num_attempts"])
    rows.writerows(
        [each.label, each.gpu_seconds, each.trained_tokens, each.num_jobs, each.num_attempts] for each in totals
    )
    return written.getvalue()
