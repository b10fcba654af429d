"""Claims: which job a worker gets next, by fair share, and the attempt that begins with it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, text, update

from core.db.models import LEASE_TOKENS, Attempt, Job, Tenant
from core.db.session import ServiceSession
from core.domain.duties import Duty
from core.domain.ids import new_id
from core.domain.jobs import SUSPECT_PATIENCE_SECONDS, JobStatus
from core.domain.scheduling import SLOT_SECONDS
from core.services.charges import charge_tenant, estimate_charge
from core.services.events import record_event
from core.services.set_asides import setting_aside
from core.services.turns import IS_IN_REACH, IS_USABLE, MAY_START

# The fairest tenant with a claimable job in the pool: the one with the least decayed usage per weight that is below its
# quotas. The partial index on `queues` (pool, rank, tenant) has the tenants with queued jobs in this order, so the
# first row is usually the answer, however many tenants and jobs there are. The lateral query finds that tenant's first
# job in the partial index of queued jobs. The tenant's row is locked so that two workers cannot pass its quota
# together. The lock is "no key update", so submissions of the same tenant do not wait for it.
_PICK = text(f"""
select t.id as tenant_id, c.id as job_id
from queues q
join tenants t on t.id = q.tenant_id
cross join lateral (
    select j.id from jobs j
    where j.pool = q.pool and j.tenant_id = q.tenant_id and j.status = 'queued' and j.run_after <= now()
      and j.suspect_step is null and {IS_IN_REACH}
    order by j.priority desc, j.id limit 1
) c
where q.pool = :pool and q.num_queued > 0 and {MAY_START}
order by q.rank, q.tenant_id
limit 1
for no key update of t skip locked
""")  # noqa: S608 (of constants)

# A job that may have killed its trainer is tried alone. An idle worker takes it at once, before any other job. Where no
# worker is idle, a busy one takes it after `SUSPECT_PATIENCE_SECONDS` and gives back the jobs that it holds. A busy
# worker follows fair share here: no tenant with a lower score may wait for a slot there or hold one (the last
# condition). So does an idle worker if the job's last attempt lent its slot.
_PICK_SUSPECT = text(f"""
select t.id as tenant_id, j.id as job_id
from jobs j join tenants t on t.id = j.tenant_id
where j.pool = :pool and j.status = 'queued' and j.suspect_step is not null
  and j.run_after <= now() - make_interval(secs => :patience) and {MAY_START} and {IS_IN_REACH}
  and ((:is_idle and (
    select a.outcome from attempts a where a.job_id = j.id order by a.lease_token desc limit 1) is distinct from 'lent')
  or not exists (
    select from tenants o
    where o.id <> t.id
      and share_rank(o.usage + o.lift, o.usage_at, o.weight) < share_rank(t.usage + t.lift, t.usage_at, t.weight)
      and o.id in (
        select q.tenant_id from queues q where q.pool = :pool and q.num_queued > 0
        union all select a.tenant_id from attempts a where a.worker_name = :worker and a.outcome is null)))
order by j.id
limit 1
for no key update of t skip locked
""")  # noqa: S608 (of constants)

# No worker is woken for an unusable base, or for one that every worker alive has just failed to load: workers try such
# bases again by themselves.
_MAY_BE_LOADED = f"""
{IS_USABLE} and (not exists (select from workers w where p.name = any (w.pools) and w.alive_until > now())
    or exists (select from workers w where p.name = any (w.pools) and w.alive_until > now()
      and not jsonb_exists(w.refusals, p.name)))
"""  # noqa: S608 (of constants)

# Each `exists` stops at the first row, so a pool costs a few index reads, however many jobs wait in it.
_CLAIMABLE_POOLS = text(f"""
select p.name from (select distinct pool as name from queues where num_queued > 0) p
where {_MAY_BE_LOADED} and exists (
    select from queues q join tenants t on t.id = q.tenant_id
    where q.pool = p.name and q.num_queued > 0 and {MAY_START} and exists (
        select from jobs j
        where j.pool = q.pool and j.tenant_id = q.tenant_id and j.status = 'queued' and j.run_after <= now()
          and {IS_IN_REACH}
    )
)
order by p.name
""")  # noqa: S608 (of constants)

# One claim skips at most this many jobs that cannot be claimed. Each is set aside, so the next claim continues behind
# them.
_MAX_CLAIM_TRIES = 10


def claim_job(
    session: ServiceSession,
    pool: str,
    *,
    worker_name: str,
    lease_seconds: float,
    is_idle: bool = False,
    slot_seconds: float = SLOT_SECONDS,
    prepare: Callable[[Job], None] = lambda _job: None,
) -> Job | None:
    """Claim the fairest job of a pool, or return None. The job's `lease_token` is the fence of all later writes.

    `slot_seconds` bounds the entry charge: the GPU-seconds that a slot of the worker uses in a quantum.

    A worker with `is_idle`, which holds no job, first takes a job that must be tried alone. A busy worker may get such
    a job (its `suspect_step` is set) after it has waited long, and must give back its other jobs before starting it. A
    job that cannot be claimed, or that `prepare` cannot read, stays queued and is set aside, and the next is claimed.
    """
    for _ in range(_MAX_CLAIM_TRIES):
        picked = _pick_job(session, pool, worker_name=worker_name, is_idle=is_idle)
        if picked is None:
            return None
        with setting_aside(session, Duty.CLAIM, row_id=picked.job_id, tenant_id=picked.tenant_id) as claim:
            job = _take_job(session, picked.job_id, tenant_id=picked.tenant_id, lease_seconds=lease_seconds)
            if job is not None:
                _begin_attempt(session, job, worker_name, slot_seconds=slot_seconds)
                prepare(job)
        if claim.is_done:
            return job
    return None


def claimable_pools(session: ServiceSession) -> Sequence[str]:
    """Return the pools with at least one job that can be claimed now."""
    return session.scalars(_CLAIMABLE_POOLS).all()


def _pick_job(session: ServiceSession, pool: str, *, worker_name: str, is_idle: bool) -> Any:
    """Return the job to claim, with its tenant, or None. The tenant's row is locked."""
    patience = 0.0 if is_idle else SUSPECT_PATIENCE_SECONDS
    suspects = {"pool": pool, "patience": patience, "is_idle": is_idle, "worker": worker_name}
    suspect = session.execute(_PICK_SUSPECT, suspects).one_or_none()
    return suspect or session.execute(_PICK, {"pool": pool}).one_or_none()


def _take_job(session: ServiceSession, job_id: uuid.UUID, *, tenant_id: uuid.UUID, lease_seconds: float) -> Job | None:
    """Give a queued job a lease, unless its tenant's quota is full by now.

    This second statement sees what was committed before the tenant's row was locked, so the quota is exact.
    """
    max_running = select(Tenant.max_running).where(Tenant.id == tenant_id).scalar_subquery()
    num_running = (
        select(func.count())
        .select_from(Job)
        .where(Job.tenant_id == tenant_id, Job.status == JobStatus.RUNNING)
        .correlate(None)
        .scalar_subquery()
    )
    taken: Job | None = session.scalar(
        update(Job)
        .where(Job.id == job_id, Job.status == JobStatus.QUEUED, num_running < max_running)
        .values(
            status=JobStatus.RUNNING,
            attempt_count=Job.attempt_count + 1,
            lease_token=LEASE_TOKENS.next_value(),
            lease_until=func.now() + timedelta(seconds=lease_seconds),
            started_at=func.coalesce(Job.started_at, func.now()),
        )
        .returning(Job)
        .execution_options(synchronize_session=False)
    )
    return taken


def _begin_attempt(session: ServiceSession, job: Job, worker_name: str, *, slot_seconds: float) -> None:
    num_steps = job.total_steps - job.trained_steps
    attempt = Attempt(
        id=new_id(),
        tenant_id=job.tenant_id,
        job_id=job.id,
        number=job.attempt_count,
        lease_token=job.lease_token,
        worker_name=worker_name,
        entry_charge_seconds=estimate_charge(job.id, pool=job.pool, num_steps=num_steps, max_seconds=slot_seconds),
    )
    session.add(attempt)
    session.flush()
    charge_tenant(session, job.tenant_id, attempt.entry_charge_seconds)
    record_event(session, job, message=f"Attempt {job.attempt_count} has started.")
