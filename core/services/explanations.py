"""Explains why a job is in its present state.

The explanation reads the job's row, its tenant's limits, the workers alive and the job's place among all waiting jobs.
Only the last depends on other tenants. The database counts it itself: the function `queue_outlook` returns sums only,
for the tenant that the transaction names. core.domain.outlook lists the reasons.
"""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Double,
    and_,
    any_,
    cast,
    func,
    literal,
    not_,
    or_,
    select,
    text,
)
from sqlalchemy.orm import InstrumentedAttribute

from core.db.models import Attempt, BaseModelRow, Job, Pool, SetAside, Tenant, Worker
from core.db.session import TenantSession
from core.domain.bases import BaseState
from core.domain.duties import Duty
from core.domain.jobs import JobStatus
from core.domain.outlook import (
    PAUSING,
    PoolQueue,
    PoolWorkers,
    Reason,
    TenantState,
    WaitingJob,
    estimate_wait,
    explain_wait,
)
from core.domain.progress import Estimate, Interval
from core.domain.scheduling import (
    ENTRY_CHARGE_SECONDS,
    USAGE_HALF_LIFE_SECONDS,
    FairnessTerms,
    slot_seconds,
)
from core.services.jobs import get_job
from core.services.progress import estimate_jobs
from core.services.quotas import is_within_storage

_WAITING_STATUSES = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.PAUSED)
# The least charge that is divided by, however few steps are left.
_LEAST_CHARGE_SECONDS = 0.01
_OUTLOOK = text("select * from queue_outlook(:pool, :job_id, :half_life, :charge, :quantum, :free_slots)")


@dataclass(frozen=True)
class Eta:
    """When a job may end. `basis` says what was measured for the interval, and `num_measured` how often."""

    interval: Interval
    basis: str
    num_measured: int


@dataclass(frozen=True)
class Explanation:
    """Why a job is in its state.

    Jobs that wait have a `queue` and `workers`. These jobs, and those about to pause, have a `reason`.

    `eta` is None where no honest estimate is possible.
    """

    job: Job
    tenant: TenantState
    reason: Reason | None = None
    queue: PoolQueue | None = None
    workers: PoolWorkers | None = None
    eta: Eta | None = None


def explain_job(
    session: TenantSession, tenant_id: uuid.UUID, *, job_id: uuid.UUID, now: dt.datetime, terms: FairnessTerms
) -> Explanation:
    """Explain a job's state. Raises NotFoundError."""
    job = get_job(session, tenant_id, job_id=job_id)
    tenant = _read_tenant(session, tenant_id)
    if job.status not in _WAITING_STATUSES:
        measured = estimate_jobs(session, tenant_id, jobs=[job], now=now).get(job.id)
        reason = PAUSING if job.pause_requested_at is not None else None
        return Explanation(job, tenant, reason, eta=_measured_eta(measured) if measured else None)
    waiting = WaitingJob(
        is_paused=job.status == JobStatus.PAUSED,
        run_after=job.run_after,
        total_steps=job.total_steps - job.trained_steps,
        last_outcome=_last_outcome(session, tenant_id, job_id),
        set_aside_until=_read_rest(session, tenant_id, job_id),
        is_base_unusable=_is_base_unusable(session, job),
    )
    workers = _read_workers(session, job.pool, terms)
    queue = _read_queue(session, job, workers, terms)
    reason = explain_wait(waiting, tenant=tenant, workers=workers, queue=queue, now=now)
    interval = estimate_wait(
        waiting, reason=reason, workers=workers, queue=queue, now=now, quantum_seconds=terms.quantum_seconds
    )
    eta = Eta(interval, "recent_jobs", queue.num_measured) if interval else None
    return Explanation(job, tenant, reason, queue, workers, eta)


def _measured_eta(estimate: Estimate) -> Eta:
    return Eta(estimate.interval, "measured_steps", estimate.num_measured)


def _read_tenant(session: TenantSession, tenant_id: uuid.UUID) -> TenantState:
    num_running = (
        select(func.count()).where(Job.tenant_id == tenant_id, Job.status == JobStatus.RUNNING).scalar_subquery()
    )
    is_within = func.within_gpu_quota(Tenant.id, Tenant.max_gpu_seconds_per_month, type_=Boolean)
    query = select(num_running, Tenant.max_running, Tenant.disabled_at.is_not(None), is_within, is_within_storage())
    query = query.where(Tenant.id == tenant_id)
    return TenantState(*session.execute(query).one())


def _last_outcome(session: TenantSession, tenant_id: uuid.UUID, job_id: uuid.UUID) -> str | None:
    own = (Attempt.tenant_id == tenant_id, Attempt.job_id == job_id)
    return session.scalar(select(Attempt.outcome).where(*own).order_by(Attempt.lease_token.desc()).limit(1))


def _read_rest(session: TenantSession, tenant_id: uuid.UUID, job_id: uuid.UUID) -> dt.datetime | None:
    """Return until when a job is set aside, or None."""
    resting = (SetAside.duty == Duty.CLAIM, SetAside.row_id == job_id, SetAside.retry_at > func.now())
    return session.scalar(select(SetAside.retry_at).where(SetAside.tenant_id == tenant_id, *resting))


def _is_base_unusable(session: TenantSession, job: Job) -> bool:
    query = select(BaseModelRow.state).where(BaseModelRow.id == job.base_model_id)
    return session.scalar(query) == BaseState.UNUSABLE


def _read_queue(session: TenantSession, job: Job, workers: PoolWorkers, terms: FairnessTerms) -> PoolQueue:
    pool = session.get(Pool, job.pool)
    step_seconds = pool.step_seconds if pool is not None else None
    num_steps = job.total_steps - job.trained_steps
    known = ENTRY_CHARGE_SECONDS if step_seconds is None else num_steps * step_seconds
    parameters = {
        "pool": job.pool,
        "job_id": job.id,
        "half_life": USAGE_HALF_LIFE_SECONDS,
        "charge": max(_LEAST_CHARGE_SECONDS, min(known, slot_seconds(terms.quantum_seconds))),
        "quantum": terms.quantum_seconds,
        "free_slots": workers.free_slots,
    }
    row = session.execute(_OUTLOOK, parameters).one_or_none()
    if row is None:  # the tenant has no queued or running job in this pool: this one is paused
        return PoolQueue(0, 0, 0.0, 0.0, 0, None, None)
    return PoolQueue(
        num_waiting=row.num_waiting,
        num_ahead=row.num_ahead,
        share_now=row.share_now,
        share_entitled=row.share_entitled,
        num_measured=row.num_measured,
        job_seconds=tuple(row.job_seconds) if row.job_seconds else None,
        step_seconds=tuple(row.step_seconds) if row.step_seconds else None,
        num_running=row.num_running,
        num_rivals=row.num_rivals,
        is_fairest=row.is_fairest,
        leave_seconds=tuple(row.leave_seconds),
        load_seconds=pool.load_seconds if pool is not None else None,
    )


def _read_workers(session: TenantSession, pool: str, terms: FairnessTerms) -> PoolWorkers:
    is_staying = and_(Worker.alive_until > func.now(), Worker.state != "stopping")
    is_present = and_(is_staying, not_(Worker.is_clock_wrong))
    is_alive = and_(is_present, not_(Worker.refusals.has_key(pool)))
    loads = and_(is_alive, or_(Worker.next_pool == pool, and_(Worker.pool == pool, Worker.state == "loading")))
    holds = and_(is_alive, Worker.pool == pool, Worker.state != "loading", Worker.next_pool.is_(None))
    is_busy = or_(Worker.slots_in_use > 0, Worker.state == "loading")
    is_elsewhere = and_(is_alive, Worker.pool != pool, Worker.next_pool.is_distinct_from(pool), is_busy)

    def count(condition: ColumnElement[bool]) -> ColumnElement[int]:
        return func.count().filter(condition)

    def add(column: InstrumentedAttribute[int]) -> ColumnElement[int]:
        return cast(func.coalesce(func.sum(column).filter(holds), 0), BigInteger)

    counted: dict[str, ColumnElement[Any]] = {
        "num_alive": count(is_alive),
        "num_serving": count(holds),
        "num_loading": count(loads),
        "num_elsewhere": count(is_elsewhere),
        "slots": add(Worker.slots),
        "slots_in_use": add(Worker.slots_in_use),
        "last_seen_at": func.max(Worker.heartbeat_at),
        "num_unfit": count(and_(is_present, Worker.refusals.has_key(pool))),
        "num_clock_wrong": count(and_(is_staying, Worker.is_clock_wrong)),
        "turn_left_seconds": cast(func.min(_turn_left(terms)).filter(is_elsewhere), Double),
    }
    query = select(*(column.label(name) for name, column in counted.items()))
    query = query.select_from(Worker).outerjoin(Pool, Pool.name == Worker.pool)
    return PoolWorkers(**session.execute(query.where(literal(pool) == any_(Worker.pools))).mappings().one())


def _turn_left(terms: FairnessTerms) -> ColumnElement[float]:
    """Return for how many more seconds a worker keeps its base."""
    turn = func.greatest(terms.turn_seconds, func.coalesce(Pool.load_seconds, 0.0) / terms.max_loading_fraction)
    return func.greatest(0.0, turn - func.extract("epoch", func.now() - Worker.pool_since))
