"""What operators are shown of jobs, workers, pools and use. Times are Unix seconds."""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from core.domain.bases import BaseState
from core.domain.ids import IdKind, format_id
from core.domain.jobs import JobStatus
from core.services.oversight import JobOverview, PoolDemand, PoolOverview, WorkerOverview
from core.services.usage import UsageGroup, UsageTotal


def _check_day(value: Any) -> Any:
    """Let days pass that are written as 2026-11-27, and not the numbers that pydantic takes for days as well."""
    if isinstance(value, str) and value.isdigit():
        raise ValueError("a day is written as 2026-11-27")
    return value


Day = Annotated[dt.date, BeforeValidator(_check_day)]


class JobOverviewObject(BaseModel):
    """A job of any tenant. `worker` and `used_seconds` are of the attempt that runs."""

    id: str
    object: Literal["job"] = "job"
    tenant: str = Field(description="The tenant's slug.")
    pool: str
    base_model: str
    quantization: str | None
    status: JobStatus
    is_pausing: bool = Field(description="It runs until its worker has stored where it stands.")
    priority: int
    trained_steps: int
    total_steps: int
    trained_tokens: int | None
    attempts: int
    max_attempts: int
    error_code: str | None = Field(description="Why it has failed; the words are the tenant's.")
    worker: str | None
    used_seconds: float | None
    created_at: int
    run_after: int = Field(description="When its next attempt may start.")
    started_at: int | None
    finished_at: int | None

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
            created_at=_seconds(job.created_at),
            run_after=_seconds(job.run_after),
            started_at=_seconds(job.started_at) if job.started_at else None,
            finished_at=_seconds(job.finished_at) if job.finished_at else None,
            **{name: getattr(job, name) for name in same},
        )


class WorkerObject(BaseModel):
    """A worker as it said of itself at its last heartbeat."""

    id: str = Field(description="Its identity, `name:pid:boot`: two processes of one name are two workers.")
    object: Literal["worker"] = "worker"
    name: str = Field(description="What it is called; several may share it.")
    version: str | None
    state: Literal["idle", "loading", "serving", "stopping", "clock_wrong"] = Field(
        description="`clock_wrong`: its host's clock is more than 30 s off the database's, so that it claims nothing."
    )
    clock_offset_seconds: float | None = Field(description="How far its host's clock is ahead of the database's.")
    is_alive: bool = Field(description="False once it has missed three heartbeats.")
    is_draining: bool
    pools: list[str] = Field(description="The pools that it may serve.")
    pool: str | None = Field(description="The pool whose base it holds or loads.")
    next_pool: str | None = Field(description="The pool whose base it is about to load instead.")
    slots: int
    slots_in_use: int
    refusals: dict[str, str] = Field(description="Why it cannot load the bases of some pools, by pool.")
    started_at: int
    heartbeat_at: int

    @classmethod
    def of(cls, worker: WorkerOverview) -> WorkerObject:
        same = ("version", "is_alive", "is_draining", "pool", "next_pool", "slots", "slots_in_use", "refusals")
        return cls(
            id=worker.name,
            name=worker.given_name,
            state=worker.shown_state,
            clock_offset_seconds=worker.clock_offset_seconds,
            pools=list(worker.pools),
            started_at=_seconds(worker.started_at),
            heartbeat_at=_seconds(worker.heartbeat_at),
            **{name: getattr(worker, name) for name in same},
        )


class PoolDemandObject(BaseModel):
    """How many workers the jobs of a pool would fill now."""

    id: str = Field(description="The pool's name.")
    object: Literal["pool.demand"] = "pool.demand"
    num_claimable: int = Field(description="Queued jobs that a worker would be given now.")
    num_running: int
    num_slots: int = Field(description="Jobs that one worker of the pool trains at a time.")
    workers_wanted: int = Field(description="(num_claimable + num_running) / num_slots, rounded up.")

    @classmethod
    def of(cls, demand: PoolDemand) -> PoolDemandObject:
        return cls(
            id=demand.pool,
            num_claimable=demand.num_claimable,
            num_running=demand.num_running,
            num_slots=demand.num_slots,
            workers_wanted=demand.workers_wanted,
        )


class PoolObject(BaseModel):
    """A pool: what waits in it, what runs, who serves it, and whether its base can be used."""

    id: str = Field(description="The pool's name.")
    object: Literal["pool"] = "pool"
    base_model: str
    quantization: str | None
    base_state: BaseState
    base_state_reason: str | None
    is_offered: bool = Field(description="Whether new jobs are taken.")
    num_queued: int = Field(description="All that is queued, what may not start yet too.")
    oldest_queued_seconds: float | None = Field(description="How long ago the oldest queued job was submitted.")
    num_claimable: int
    num_running: int
    num_slots: int
    workers_wanted: int
    num_workers: int = Field(description="Workers alive that may serve it.")
    num_holding: int = Field(description="Those of them that hold its base.")
    num_refusing: int = Field(description="Those of them that cannot load its base.")
    slots_in_use: int

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


class UsageObject(BaseModel):
    """What a tenant, a pool or a day (UTC) has used: attempts that have ended."""

    id: str = Field(description="The tenant's slug, the pool's name, or the day.")
    object: Literal["usage"] = "usage"
    group_by: UsageGroup
    gpu_seconds: float
    trained_tokens: int
    num_jobs: int
    num_attempts: int

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
    """Return totals as CSV (RFC 4180) with a header; the first column is named after the group."""
    written = io.StringIO()
    rows = csv.writer(written)
    rows.writerow([group, "gpu_seconds", "trained_tokens", "num_jobs", "num_attempts"])
    rows.writerows(
        [each.label, each.gpu_seconds, each.trained_tokens, each.num_jobs, each.num_attempts] for each in totals
    )
    return written.getvalue()


def _seconds(instant: dt.datetime) -> int:
    return int(instant.timestamp())
