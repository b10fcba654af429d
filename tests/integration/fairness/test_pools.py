"""Which pool a worker serves next: pools have turns."""

from __future__ import annotations

from sqlalchemy import Engine, text

from core.db.session import service_transaction
from core.domain.workers import WorkerFacts
from core.services import turns
from core.services.turns import PoolChoice
from tests.factories.bases import BASE_MODEL, NF4_POOL, POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant, add_tenant
from tests.integration.fairness.sharing import add_worker, choose, set_usage


def test_a_pool_keeps_its_worker_for_its_turn_and_then_the_fairest_job_decides(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    queue_job(owner, other_tenant, quantization="nf4")
    set_usage(owner, tenant, 1000)
    assert choose(worker, pool=POOL, keeps_pool=True) == POOL
    assert choose(worker, pool=POOL, keeps_pool=False) == NF4_POOL
    set_usage(owner, other_tenant, 2000)
    assert choose(worker, pool=POOL, keeps_pool=False) == POOL
    assert choose(worker, pool=None, keeps_pool=False) == POOL


def test_of_one_tenant_the_older_job_decides_between_pools(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant, quantization="nf4")
    for _ in range(10):
        queue_job(owner, tenant)
    assert choose(worker, pool=POOL, keeps_pool=False) == NF4_POOL
    queue_job(owner, tenant, priority=1)
    assert choose(worker, pool=POOL, keeps_pool=False) == POOL


def test_one_holder_that_used_less_keeps_no_pool_for_another_that_used_more(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    """A tenant that can use one slot only stays below its share for ever."""
    small = add_tenant(owner)
    queue_job(owner, other_tenant, quantization="nf4")
    set_usage(owner, other_tenant, 31_425)
    set_usage(owner, tenant, 31_500)
    set_usage(owner, small, 4_500)
    assert choose(worker, pool=POOL, keeps_pool=False, holders=[small.id]) == POOL
    assert choose(worker, pool=POOL, keeps_pool=False, holders=[tenant.id, small.id]) == NF4_POOL


def test_who_holds_slots_and_used_less_keeps_the_pool(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    queue_job(owner, other_tenant, quantization="nf4")
    set_usage(owner, other_tenant, 1000)
    for usage, expected in ((500, POOL), (1500, NF4_POOL)):
        set_usage(owner, tenant, usage)
        assert choose(worker, pool=POOL, keeps_pool=False, holders=[tenant.id]) == expected
    with service_transaction(owner) as session:
        session.execute(text("update jobs set status = 'paused' where status = 'queued'"))
    assert choose(worker, pool=POOL, keeps_pool=False, holders=[tenant.id]) == POOL
    assert choose(worker, pool=POOL, keeps_pool=False) is None


def test_one_worker_moves_for_one_job(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant, quantization="nf4")
    add_worker(owner, WorkerFacts("w", (POOL, NF4_POOL), "serving", POOL, 8, 0))
    add_worker(owner, WorkerFacts("x", (POOL, NF4_POOL), "serving", POOL, 8, 0))
    assert choose(worker, pool=POOL, keeps_pool=True) == NF4_POOL
    choice = PoolChoice("x", (POOL, NF4_POOL), POOL, keeps_pool=False)
    with service_transaction(worker) as session:
        assert turns.choose_pool(session, choice) is None, "w has said that it takes the job"


def test_as_many_workers_move_as_the_jobs_that_may_start_fill(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    """A pool that is scaled out does not load its base on one worker after another."""
    for name in ("w", "x", "y", "z"):
        add_worker(owner, WorkerFacts(name, (POOL,), "idle"))

    def moves(name: str) -> bool:
        with service_transaction(worker) as session:
            return turns.choose_pool(session, PoolChoice(name, (POOL,), None, keeps_pool=False)) == POOL

    with service_transaction(owner) as session:
        slots = session.scalar(text("select slots from base_models where id = :id"), {"id": BASE_MODEL})
    for _ in range(slots):
        queue_job(owner, tenant)
    set_usage(owner, tenant, 0, max_running=slots)
    assert (moves("w"), moves("x")) == (True, False), "w has room for all of them"
    queue_job(owner, tenant)
    assert not moves("x"), "the tenant's quota lets no more start"
    set_usage(owner, tenant, 0, max_running=100)
    assert (moves("x"), moves("y")) == (True, False), "x has room for one more"
    add_worker(owner, WorkerFacts("w", (POOL,), "serving", POOL, slots, slots))
    assert (moves("y"), moves("z")) == (True, False), "w has no room any more, and y has"
