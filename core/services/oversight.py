"""What operators see of jobs, workers and pools of all tenants. They never see a tenant's texts, files or rows.

The operator's role reads views that leave out the tenant's own columns (migration 0021), and cannot read the tables
behind them. Every list is a page. No list scans all jobs: a filter looks up one index for each status and pool, newest
first.
"""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import RowMapping, func, select, text

from core.db.models import Worker
from core.db.session import OperatorSession
from core.domain.bases import BaseState
from core.domain.errors import NotFoundError
from core.domain.jobs import JobStatus
from core.domain.values import Page
from core.services.tenants import find_tenant

# Ids of the newest jobs before the cursor. Each query compares and sorts by all columns of one index. If it sorted by
# the id alone, the planner would scan all jobs from the newest whenever it expects many matches. Where it expects few
# matches, it would read and sort them all, so sorting what an index already orders is switched off.
_NO_SORT = text("select set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true)")
_NEWEST = "(select j.id from operator_jobs j where j.id < :after order by j.id desc limit :num)"
_NEWEST_OF_TENANT = """
(select j.id from operator_jobs j where (j.tenant_id, j.id) < (:tenant_id, :after) and j.tenant_id >= :tenant_id
order by j.tenant_id desc, j.id desc limit :num)
"""
# One branch for each status: PostgreSQL uses a partial index only where the statement contains the status as a
# constant.
_NEWEST_OF_STATUS = """
(select n.id from unnest(cast(:pools as text[])) p (name) cross join lateral (
    select j.id from operator_jobs j
    where {of_tenant} (j.pool, j.status, j.id) < (p.name, '{status}', :after)
      and (j.pool, j.status) >= (p.name, '{status}') and j.status = '{status}'
    order by j.pool desc, j.id desc limit :num) n)
"""
_JOBS = """
select j.*, t.slug from (select id from ({newest}) found order by id desc limit :num) page
join operator_jobs j on j.id = page.id join tenants t on t.id = j.tenant_id order by j.id desc
"""
_AFTER_ALL = uuid.UUID(int=2**128 - 1)
_POOL_NAMES = text("select distinct pool from queues")
_KNOWN_POOLS = text("""
select b.id || '@' || q.name as pool
from base_models b cross join lateral unnest(array['none'] || b.quantizations) q (name)
union select pool from queues order by pool
""")
# One page of pools, each with its base, queue, oldest waiting job and workers. The lateral subqueries run once for each
# pool of the page. The oldest waiting job is the one with the least id, because ids sort by time.
_POOLS = text("""
select d.*, b.id as base_model_id, nullif(split_part(d.pool, '@', 2), 'none') as quantization, b.state, b.state_reason,
    b.is_enabled as is_in_registry, b.disabled_at is not null as is_disabled, q.num_queued, o.oldest_seconds, w.*
from (select * from pool_demand where pool > :after order by pool limit :num) d
join base_models b on b.id = split_part(d.pool, '@', 1)
cross join lateral (
    select coalesce(sum(num_queued), 0)::bigint as num_queued from queues where queues.pool = d.pool) q
left join lateral (
    select greatest(extract(epoch from now() - j.created_at), 0)::float8 as oldest_seconds
    from operator_jobs j where j.pool = d.pool and j.status = 'queued' order by j.id limit 1) o on true
cross join lateral (
    select count(*) as num_workers, count(*) filter (where v.pool = d.pool and v.state <> 'loading') as num_holding,
        count(*) filter (where jsonb_exists(v.refusals, d.pool)) as num_refusing,
        coalesce(sum(v.slots_in_use) filter (where v.pool = d.pool), 0)::bigint as slots_in_use
    from workers v where d.pool = any (v.pools) and v.alive_until > now() and v.state <> 'stopping'
        and not v.is_clock_wrong) w
order by d.pool
""")
_DEMAND = text("select * from pool_demand where pool = :pool")


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list. None means any. `tenant` is a slug."""

    status: JobStatus | None = None
    pool: str | None = None
    tenant: str | None = None


@dataclass(frozen=True)
class JobOverview:
    """A job as an operator sees it. `worker_name` and `used_seconds` belong to the running attempt."""

    id: uuid.UUID
    tenant: str
    pool: str
    base_model_id: str
    quantization: str | None
    status: JobStatus
    priority: int
    total_steps: int
    trained_steps: int
    trained_tokens: int | None
    pause_requested_at: dt.datetime | None
    attempt_count: int
    max_attempts: int
    error_code: str | None
    worker_name: str | None
    used_seconds: float | None
    run_after: dt.datetime
    created_at: dt.datetime
    started_at: dt.datetime | None
    finished_at: dt.datetime | None


@dataclass(frozen=True)
class WorkerOverview:
    """A worker as it described itself. `is_alive` is by the database's clock, and `name` is its identity.

    `clock_offset_seconds` is how far its host's clock is ahead. A worker with `is_clock_wrong` claims no job.
    """

    name: str
    given_name: str
    version: str | None
    state: str
    is_alive: bool
    pools: tuple[str, ...]
    pool: str | None
    next_pool: str | None
    slots: int
    slots_in_use: int
    refusals: dict[str, str]
    started_at: dt.datetime
    heartbeat_at: dt.datetime
    silent_seconds: float
    clock_offset_seconds: float | None
    is_clock_wrong: bool

    @property
    def is_draining(self) -> bool:
        return self.state == "stopping"

    @property
    def shown_state(self) -> str:
        """The most important state: "stopping" comes before a wrong clock."""
        return "clock_wrong" if self.is_clock_wrong and not self.is_draining else self.state


@dataclass(frozen=True)
class PoolDemand:
    """How many workers the jobs of a pool would fill: the running jobs and those that may start now."""

    pool: str
    num_claimable: int
    num_running: int
    num_slots: int
    workers_wanted: int


@dataclass(frozen=True)
class PoolOverview:
    """A pool: its demand, its queue, how long the oldest job has waited, the workers that can serve it, its base."""

    demand: PoolDemand
    base_model_id: str
    quantization: str | None
    base_state: BaseState
    state_reason: str | None
    is_offered: bool
    num_queued: int
    oldest_seconds: float | None
    num_workers: int
    num_holding: int
    num_refusing: int
    slots_in_use: int


def list_job_overviews(
    session: OperatorSession, wanted: JobFilter, *, after: uuid.UUID | None = None, limit: int
) -> Page[JobOverview]:
    """Return jobs of all tenants, newest first. Raises NotFoundError for an unknown tenant."""
    values: dict[str, Any] = {"num": limit + 1, "after": after or _AFTER_ALL, "pools": [wanted.pool]}
    if wanted.tenant is not None:
        values["tenant_id"] = find_tenant(session, wanted.tenant).id
    newest = _NEWEST if wanted.tenant is None else _NEWEST_OF_TENANT
    if wanted.status is not None or wanted.pool is not None:
        session.execute(_NO_SORT)
        of_tenant = "" if wanted.tenant is None else "j.tenant_id = :tenant_id and"
        statuses = [wanted.status] if wanted.status is not None else list(JobStatus)
        newest = " union all ".join(_NEWEST_OF_STATUS.format(status=each, of_tenant=of_tenant) for each in statuses)
        if wanted.pool is None:
            values["pools"] = list(session.scalars(_POOL_NAMES))
    rows = session.execute(text(_JOBS.format(newest=newest)), values).mappings().all()
    return Page.cut([_job_overview(row) for row in rows], limit)


def _job_overview(row: RowMapping) -> JobOverview:
    same = {each.name: row[each.name] for each in fields(JobOverview) if each.name not in ("tenant", "status")}
    return JobOverview(tenant=row["slug"], status=JobStatus(row["status"]), **same)


def list_worker_overviews(session: OperatorSession, *, after: str | None = None, limit: int) -> Page[WorkerOverview]:
    """Return the workers that have a row, alive or not, by identity. A worker that stopped properly has none."""
    silent = func.extract("epoch", func.now() - Worker.heartbeat_at)
    query = select(Worker, Worker.alive_until > func.now(), silent)
    if after is not None:
        query = query.where(Worker.name > after)
    rows = session.execute(query.order_by(Worker.name).limit(limit + 1)).all()
    found = [_worker_overview(row, is_alive=is_alive, silent_seconds=float(seconds)) for row, is_alive, seconds in rows]
    return Page.cut(found, limit)


def _worker_overview(row: Worker, *, is_alive: bool, silent_seconds: float) -> WorkerOverview:
    return WorkerOverview(
        name=row.name,
        given_name=row.given_name or row.name,
        version=row.version,
        state=row.state,
        is_alive=is_alive,
        pools=tuple(row.pools),
        pool=row.pool,
        next_pool=row.next_pool,
        slots=row.slots,
        slots_in_use=row.slots_in_use,
        refusals=dict(row.refusals),
        started_at=row.started_at,
        heartbeat_at=row.heartbeat_at,
        silent_seconds=max(0.0, silent_seconds),
        clock_offset_seconds=row.clock_offset_seconds,
        is_clock_wrong=row.is_clock_wrong,
    )


def list_pool_overviews(session: OperatorSession, *, after: str | None = None, limit: int) -> Page[PoolOverview]:
    """Return every pool of the known bases, by name."""
    rows = session.execute(_POOLS, {"after": after or "", "num": limit + 1}).mappings().all()
    return Page.cut([_pool_overview(row) for row in rows], limit)


def _pool_overview(row: RowMapping) -> PoolOverview:
    return PoolOverview(
        demand=_demand(row),
        base_model_id=row["base_model_id"],
        quantization=row["quantization"],
        base_state=BaseState(row["state"]),
        state_reason=row["state_reason"],
        is_offered=row["is_in_registry"] and not row["is_disabled"],
        num_queued=row["num_queued"],
        oldest_seconds=row["oldest_seconds"],
        num_workers=row["num_workers"],
        num_holding=row["num_holding"],
        num_refusing=row["num_refusing"],
        slots_in_use=row["slots_in_use"],
    )


def list_pool_names(session: OperatorSession) -> tuple[str, ...]:
    """Return the name of every pool that has had a job, or whose base is known."""
    return tuple(session.scalars(_KNOWN_POOLS))


def find_pool_demand(session: OperatorSession, pool: str) -> PoolDemand:
    """Return a pool's demand. Raises NotFoundError if no known base has such a pool."""
    row = session.execute(_DEMAND, {"pool": pool}).mappings().one_or_none()
    if row is None:
        raise NotFoundError(f"There is no pool {pool[:200]!r}.", code="pool_not_found")
    return _demand(row)


def _demand(row: RowMapping) -> PoolDemand:
    return PoolDemand(**{each.name: row[each.name] for each in fields(PoolDemand)})
