"""Operators' lists on a hundred thousand jobs: none looks at more than a few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, text

from core.db.session import OperatorSession, operator_transaction, service_transaction
from core.domain.jobs import JobStatus
from core.services.oversight import JobFilter, list_job_overviews, list_pool_overviews
from tests.databases import run, statements_of
from tests.factories.bases import NF4_POOL, POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant, add_tenant

NUM_JOBS = 100_000
_FETCHED = text("select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relname = 'jobs'")


@pytest.fixture(scope="module")
def crowd(owner: Engine) -> Iterator[Tenant]:
    """A hundred thousand jobs: of 50 tenants, half of them of one; a few failed, a few running, in two pools."""
    whale = add_tenant(owner)
    run(owner, "truncate jobs, queues, usage, workers cascade")
    seed = queue_job(owner, whale)
    others = [add_tenant(owner) for _ in range(49)]
    run(
        owner,
        """insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status)
        select uuidv7(), t.id, 'a', 'fine-tune', 1, repeat('0', 64), 'k', 1, 'processed' from tenants t
        where t.id = any(:ids)""",
        ids=[each.id for each in others],
    )
    fill = """
        insert into jobs (id, name_digits, tenant_id, base_model_id, pool, quantization, training_file_id, spec, total_steps, status,
            finished_at, error, lease_token, lease_until)
        select uuidv7(), lpad(to_hex(n), 8, '0'), f.tenant_id, s.base_model_id, s.base_model_id || '@' || case when n % 10 = 0 then 'nf4' else 'none' end,
            case when n % 10 = 0 then 'nf4' end, f.id, s.spec, s.total_steps, v.status,
            case when v.status in ('cancelled', 'failed') then now() end,
            case when v.status = 'failed' then '{"code": "diverged"}'::jsonb end,
            case when v.status = 'running' then n end, case when v.status = 'running' then now() end
        from generate_series(1, :num_jobs) n cross join jobs s
        join lateral (select case when n % 25000 = 1 then 'failed' when n % 5000 = 2 then 'running'
            when n % 5 = 0 then 'queued' else 'cancelled' end as status) v on true
        join lateral (select id, tenant_id from files
            where tenant_id = case when n % 2 = 0 then :whale else (cast(:others as uuid[]))[1 + n / 2 % 49] end limit 1) f on true
        where s.id = :seed"""
    count = """
        insert into queues (tenant_id, pool, num_queued, rank)
        select tenant_id, pool, count(*) filter (where status = 'queued'), 0 from jobs group by tenant_id, pool
        on conflict (tenant_id, pool) do update set num_queued = excluded.num_queued"""
    values = {"num_jobs": NUM_JOBS, "whale": whale.id, "others": [each.id for each in others], "seed": seed.id}
    with service_transaction(owner) as session:
        session.execute(text("set local session_replication_role = replica"))  # no trigger counts them one by one
        session.execute(text(fill), values)
        session.execute(text(count))
    with owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze jobs"))
    yield whale
    run(owner, "truncate jobs, queues cascade")


def count_visited(plan: dict[str, Any]) -> float:
    """Return how many rows and index entries the scans of a plan have looked at."""
    looked = 0.0
    if "Scan" in plan["Node Type"] and "Relation Name" in plan:
        removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
        looked = (plan["Actual Rows"] + removed) * plan["Actual Loops"]
    return looked + sum(count_visited(each) for each in plan.get("Plans", ()))


def rows_visited_by(owner: Engine, ask: Callable[[OperatorSession], object]) -> float:
    """Return how many rows the statements of a service look at, as PostgreSQL itself counts them."""
    with operator_transaction(owner, actor="test") as session:
        with statements_of(owner) as seen:
            ask(session)
        plans = [
            session.connection().exec_driver_sql(f"explain (analyze, format json) {statement}", parameters).scalar_one()
            for statement, parameters in seen
        ]
    return sum(count_visited(plan[0]["Plan"]) for plan in plans)


@pytest.mark.parametrize("status", [None, *JobStatus])
@pytest.mark.parametrize("pool", [None, NF4_POOL, POOL])
@pytest.mark.parametrize("is_of_whale", [False, True])
def test_no_list_of_jobs_walks_all_of_them(
    owner: Engine, crowd: Tenant, status: JobStatus | None, pool: str | None, is_of_whale: bool
) -> None:
    wanted = JobFilter(status=status, pool=pool, tenant=crowd.slug if is_of_whale else None)
    assert rows_visited_by(owner, lambda session: list_job_overviews(session, wanted, limit=20)) < NUM_JOBS / 50


@pytest.mark.usefixtures("crowd")
def test_pools_and_their_demand_are_told_without_a_walk_over_what_is_queued(owner: Engine) -> None:
    with operator_transaction(owner, actor="test") as session:
        before = session.scalars(_FETCHED).one()
        nf4, none = list_pool_overviews(session, limit=20).items
        fetched = session.scalars(_FETCHED).one() - before
    assert (nf4.num_queued, none.num_queued) == (10_000, 10_001)
    assert (nf4.demand.num_running, none.demand.num_running) == (0, 20)
    assert none.demand.num_claimable > 0
    assert fetched < NUM_JOBS / 50
