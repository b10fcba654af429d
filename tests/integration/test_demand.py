"""A pool's demand equals what its workers would get: as many jobs as the claim itself hands out."""

from __future__ import annotations

import random
from typing import Any

import pytest
from sqlalchemy import Engine

from core.db.models import Tenant as TenantRow
from core.db.session import connect, operator_transaction, service_transaction
from core.domain.errors import NotFoundError
from core.services import claims
from core.services.census import take_census
from core.services.oversight import PoolDemand, find_pool_demand
from tests.databases import Database, run
from tests.factories.bases import NF4_POOL, POOL
from tests.factories.jobs import claim, queue_job
from tests.factories.tenants import Tenant, add_tenant


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    """The worker's role on a queue that is empty of other tests' jobs, and a base that may be used."""
    run(owner, "truncate jobs, queues, set_asides cascade")
    run(owner, "update base_models set state = 'usable', state_reason = null, slots = 8")
    return worker


def demand_of(owner: Engine, pool: str = POOL) -> PoolDemand:
    with operator_transaction(owner, actor="test") as session:
        return find_pool_demand(session, pool)


def figures_of(database: Database, pool: str = POOL) -> tuple[int, int]:
    """Return the claimable jobs and the wanted workers that the schedule's own login counts."""
    engine = connect(database.schedule_url)
    with service_transaction(engine) as session:
        nums = {each.subject: each.num for each in take_census(session) if each.pool == pool}
    engine.dispose()
    return nums["claimable"], nums["workers_wanted"]


def set_limits(owner: Engine, tenant: Tenant, **limits: Any) -> None:
    with service_transaction(owner) as session:
        row = session.get_one(TenantRow, tenant.id)
        for name, value in limits.items():
            setattr(row, name, value)


@pytest.mark.usefixtures("worker")
def test_a_pool_without_jobs_wants_no_worker_and_still_has_a_row(owner: Engine) -> None:
    for pool in (POOL, NF4_POOL):
        assert demand_of(owner, pool) == PoolDemand(pool, 0, 0, 8, 0)
    with pytest.raises(NotFoundError):
        demand_of(owner, "acme-labs/none-such@none")


@pytest.mark.parametrize(("num_jobs", "wanted"), [(1, 1), (8, 1), (9, 2), (17, 3)])
def test_workers_are_wanted_for_what_runs_and_what_may_start(
    worker: Engine, owner: Engine, tenant: Tenant, num_jobs: int, wanted: int
) -> None:
    set_limits(owner, tenant, max_running=100)
    for _ in range(num_jobs):
        queue_job(owner, tenant)
    assert demand_of(owner) == PoolDemand(POOL, num_jobs, 0, 8, wanted)
    assert claim(worker) is not None
    assert demand_of(owner) == PoolDemand(POOL, num_jobs - 1, 1, 8, wanted)
    assert demand_of(owner, NF4_POOL).workers_wanted == 0


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    "statement",
    [
        "update jobs set run_after = now() + interval '1 hour'",
        "update jobs set status = 'paused'",
        "update tenants set disabled_at = now() where id in (select tenant_id from jobs)",
        "update tenants set max_running = 0 where id in (select tenant_id from jobs)",
        "update tenants set max_gpu_seconds_per_month = 0 where id in (select tenant_id from jobs)",
        "update tenants set max_storage_bytes = 0 where id in (select tenant_id from jobs)",
        "update base_models set state = 'unusable', state_reason = 'It is not there.'",
        """insert into set_asides (duty, row_id, tenant_id, reason, retry_at)
           select 'claim', id, tenant_id, 'It cannot be read.', now() + interval '1 hour' from jobs""",
    ],
)
def test_what_may_not_start_wants_no_worker(database: Database, owner: Engine, tenant: Tenant, statement: str) -> None:
    queue_job(owner, tenant)
    assert demand_of(owner).workers_wanted == 1
    assert figures_of(database) == (1, 1)
    run(owner, statement)
    assert demand_of(owner) == PoolDemand(POOL, 0, 0, 8, 0)
    waits_for_the_operator = "unusable" in statement
    assert figures_of(database) == (int(waits_for_the_operator), 0)


def test_of_a_tenant_no_more_jobs_are_claimable_than_it_may_start(
    database: Database, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    set_limits(owner, tenant, max_running=3)
    for _ in range(9):
        queue_job(owner, tenant)
    assert claim(worker) is not None
    assert demand_of(owner) == PoolDemand(POOL, 2, 1, 8, 1)
    assert figures_of(database) == (2, 1)


def test_what_runs_wants_its_worker_whatever_became_of_its_base_or_tenant(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    assert claim(worker) is not None
    run(owner, "update base_models set state = 'unusable', state_reason = 'It is not there.'")
    run(owner, "update tenants set disabled_at = now() where id = :id", id=tenant.id)
    assert demand_of(owner) == PoolDemand(POOL, 0, 1, 8, 1)


@pytest.mark.usefixtures("worker")
def test_a_pool_that_left_the_registry_wants_workers_for_what_was_submitted(owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant, quantization="nf4")
    run(owner, "update base_models set quantizations = '{}', is_enabled = false")
    try:
        assert demand_of(owner, NF4_POOL).workers_wanted == 1
        assert demand_of(owner, POOL).workers_wanted == 0
    finally:
        run(owner, "update base_models set quantizations = '{nf4}', is_enabled = true")


def test_the_demand_is_what_the_claim_hands_out_and_what_the_schedule_counts(
    database: Database, worker: Engine, owner: Engine
) -> None:
    """The three are different statements, and must not come to mean different things."""
    draw = random.Random(7)
    for _ in range(6):
        tenant = add_tenant(owner)
        limits = {"max_running": draw.randint(0, 5), "max_storage_bytes": draw.choice([None, 0, 10**9])}
        set_limits(owner, tenant, **limits)
        for _ in range(draw.randint(0, 6)):
            queue_job(owner, tenant)
    run(owner, "update jobs set run_after = now() + interval '1 hour' where id in (select id from jobs limit 3)")
    told = demand_of(owner)
    assert figures_of(database) == (told.num_claimable, told.workers_wanted)
    handed_out = 0
    while claim(worker) is not None:
        handed_out += 1
    assert told.num_claimable == handed_out > 0
    assert demand_of(owner) == PoolDemand(POOL, 0, handed_out, 8, -(-handed_out // 8))
    assert figures_of(database) == (0, -(-handed_out // 8))
    with service_transaction(worker) as session:
        assert claims.claim_job(session, POOL, worker_name="w", lease_seconds=60) is None
