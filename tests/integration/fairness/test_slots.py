"""A slot is lent after its quantum, to a tenant that used less."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Engine, select, text

from core.db.models import Attempt, Job
from core.db.session import service_transaction
from core.domain.workers import WorkerFacts
from core.services import attempts
from core.services.turns import Loan
from tests.factories.bases import NF4_POOL, POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant, add_tenant
from tests.integration.fairness.sharing import (
    add_worker,
    choose,
    claim,
    hold_slots,
    lend,
    lend_to,
    set_usage,
    train,
)


def test_a_slot_that_has_had_its_quantum_is_lent_to_a_tenant_that_used_less(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=3, seconds_ago=601)
    assert lend(worker, held) is None, "nobody waits"
    set_usage(owner, tenant, 5000)
    waiting = queue_job(owner, other_tenant)
    token = lend(worker, held)
    assert token == held[0].token, "the one that had its slot for the longest"
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, held[0])
    with service_transaction(owner) as session:
        lent = session.get_one(Job, held[0].job_id)
        assert (lent.status, lent.attempt_count) == ("queued", 0), "nothing is counted"
        outcome = session.scalar(select(Attempt.outcome).where(Attempt.lease_token == held[0].token))
        assert outcome == "lent"
    assert claim(worker).job_id == waiting.id


def test_no_slot_is_lent_before_its_quantum_nor_before_its_job_has_done_a_step(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    young = hold_slots(owner, worker, tenant, count=1, seconds_ago=590)
    set_usage(owner, tenant, 5000)
    queue_job(owner, tenant)
    unstepped = claim(worker)
    train(owner, unstepped, steps=0, seconds_ago=900)
    queue_job(owner, tenant)
    loading = claim(worker)  # it has a slot and does not step yet
    queue_job(owner, other_tenant)
    assert lend(worker, [*young, unstepped, loading]) is None
    train(owner, young[0], seconds_ago=601)
    assert lend(worker, [*young, unstepped, loading]) == young[0].token


def test_slots_are_lent_to_lower_scores_only_and_not_for_a_small_difference(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    queue_job(owner, other_tenant)
    set_usage(owner, tenant, 1000)
    for usage, is_lent in ((1200, False), (1000, False), (970, False), (960, True)):
        set_usage(owner, other_tenant, usage)
        assert (lend(worker, held) is not None) is is_lent, usage


def test_a_weight_counts_in_who_lends(worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant) -> None:
    held = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    queue_job(owner, other_tenant)
    set_usage(owner, other_tenant, 500)
    set_usage(owner, tenant, 1200, weight=3)
    assert lend(worker, held) is None, "400 a weight is less than 500"
    set_usage(owner, tenant, 1800, weight=3)
    assert lend(worker, held) == held[0].token


def test_the_tenant_most_above_its_share_lends_first(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    whale = add_tenant(owner)
    mine = hold_slots(owner, worker, tenant, count=1, seconds_ago=5000)
    whales = hold_slots(owner, worker, whale, count=1, seconds_ago=700)
    set_usage(owner, tenant, 1000)
    set_usage(owner, whale, 9000)
    queue_job(owner, add_tenant(owner))
    assert lend(worker, [*mine, *whales]) == whales[0].token


def test_as_many_slots_are_lent_at_a_time_as_jobs_wait_that_may_start(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=4, seconds_ago=601)
    set_usage(owner, tenant, 5000)
    for _ in range(5):
        queue_job(owner, other_tenant)
    set_usage(owner, other_tenant, 0, max_running=2)
    lent = [lend(worker, held) for _ in range(4)]
    assert len({token for token in lent if token}) == 2
    assert lent[2:] == [None, None]
    with service_transaction(owner) as session:
        session.execute(text("update tenants set max_running = 0 where id = :id"), {"id": other_tenant.id})
    assert lend(worker, held) is None


def test_a_job_that_another_worker_is_about_to_take_is_left_to_it_for_a_minute(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    set_usage(owner, tenant, 5000)
    waiting = queue_job(owner, other_tenant)
    for facts in (
        WorkerFacts("other", (POOL,), "idle"),
        WorkerFacts("other", (POOL,), "serving", POOL, 8, 7),
        WorkerFacts("other", (POOL,), "loading", POOL, 8, 0),
        WorkerFacts("other", (POOL, NF4_POOL), "serving", NF4_POOL, 8, 8, next_pool=POOL),
    ):
        add_worker(owner, facts)
        assert lend(worker, held) is None, facts
    for facts in (
        WorkerFacts("other", (POOL,), "serving", POOL, 8, 8),
        WorkerFacts("other", (NF4_POOL,), "idle"),
        WorkerFacts("other", (POOL,), "stopping", POOL, 8, 7),
    ):
        add_worker(owner, facts)
        assert lend(worker, held) is not None, facts
        with service_transaction(owner) as session:
            session.execute(text("update attempts set lending_at = null"))
    add_worker(owner, WorkerFacts("other", (POOL,), "idle"))
    with service_transaction(owner) as session:
        session.get_one(Job, waiting.id).run_after -= timedelta(seconds=61)
    assert lend(worker, held) is not None, "nobody has taken it"


def test_a_held_job_that_lacks_memory_is_lent_a_slot_of_a_tenant_that_used_more(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=2, seconds_ago=601)
    queue_job(owner, other_tenant)
    wanting = claim(worker)
    set_usage(owner, tenant, 5000)
    set_usage(owner, other_tenant, 9000)
    assert lend_to(worker, [*held, wanting], wanting=[wanting]) is None
    set_usage(owner, other_tenant, 100)
    assert lend_to(worker, [*held, wanting], wanting=[wanting]) == Loan(held[0].token, wanting.token)


def test_a_job_that_lacks_memory_keeps_no_slot_from_those_who_wait_and_the_fairest_of_several_is_lent_to(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=2, seconds_ago=601)
    queue_job(owner, tenant)
    whales = claim(worker)
    set_usage(owner, tenant, 5000)
    queue_job(owner, other_tenant)
    assert lend_to(worker, held, wanting=[whales]) == Loan(held[0].token, None)
    others = claim(worker)
    assert others.tenant_id == other_tenant.id
    assert lend_to(worker, held, wanting=[whales, others]) == Loan(held[1].token, others.token)


def test_a_mark_that_its_worker_never_heard_of_lapses(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    set_usage(owner, tenant, 5000)
    queue_job(owner, other_tenant)
    assert lend(worker, held) == held[0].token
    assert lend(worker, held) is None
    with service_transaction(owner) as session:
        session.execute(text("update attempts set lending_at = now() - interval '3 minutes'"))
    assert lend(worker, held) == held[0].token


def test_no_slot_is_lent_for_jobs_that_wait_for_their_next_try(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=3, seconds_ago=601)
    set_usage(owner, tenant, 5000)
    later = [queue_job(owner, other_tenant).id for _ in range(5)]
    with service_transaction(owner) as session:
        session.execute(text("update jobs set run_after = now() + interval '1 h' where id = any(:ids)"), {"ids": later})
    assert lend(worker, held) is None
    queue_job(owner, other_tenant)
    assert [lend(worker, held) is not None for _ in range(2)] == [True, False]


def test_a_suspect_is_lent_a_slot_once_it_has_waited_and_holds_up_no_other_pool_before(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    set_usage(owner, tenant, 5000)
    suspect = queue_job(owner, other_tenant)
    waiting = queue_job(owner, add_tenant(owner), quantization="nf4")
    set_usage(owner, other_tenant, 0)
    with service_transaction(owner) as session:
        session.get_one(Job, suspect.id).suspect_step = 0
        session.execute(text("update tenants set usage = 100 where id = :id"), {"id": waiting.tenant_id})
    assert lend(worker, held) is None
    assert choose(worker, pool=POOL, keeps_pool=False, holders=[tenant.id]) == NF4_POOL
    with service_transaction(owner) as session:
        session.get_one(Job, suspect.id).run_after -= timedelta(seconds=61)
    assert choose(worker, pool=POOL, keeps_pool=False, holders=[tenant.id]) == POOL
    assert lend(worker, held) == held[0].token


def test_a_suspect_whose_slot_was_lent_is_not_taken_again_before_those_who_used_less(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    (suspect,) = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    set_usage(owner, tenant, 5000)
    with service_transaction(owner) as session:
        session.get_one(Job, suspect.job_id).suspect_step = 0
    waiting = queue_job(owner, other_tenant)
    assert lend(worker, [suspect]) == suspect.token
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, suspect)
    assert claim(worker, is_idle=True).job_id == waiting.id
