"""Fair in time: slots that are lent, pools that have turns, newcomers that start level, charges that follow the use."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence

import pytest
from sqlalchemy import Engine, select, text

from core.db.models import Attempt, Job, Pool
from core.db.models import Tenant as TenantRow
from core.db.session import connect, service_transaction
from core.domain.jobs import pool_name
from core.domain.leases import Lease
from core.domain.scheduling import ENTRY_CHARGE_SECONDS, FairnessTerms
from core.domain.workers import WorkerFacts
from core.services import attempts, charges, claims, turns
from core.services.jobs import pause_job, resume_job
from core.services.promises import check_rows
from core.services.resume_points import begin_steps
from core.services.turns import Loan, PoolChoice, SlotTerms
from core.services.workers import record_worker
from tests.integration.conftest import BASE_MODEL, Database, Tenant, add_tenant
from tests.integration.test_attempts import POOL
from tests.integration.training import queue_job, record_step

NF4_POOL = pool_name(BASE_MODEL, "nf4")
TERMS = SlotTerms(quantum_seconds=600.0, slot_seconds=75.0)
FAIRNESS = FairnessTerms()


@pytest.fixture
def worker(database: Database, owner: Engine) -> Iterator[Engine]:
    """The worker's role on queues that are empty of other tests' jobs."""
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs, queues, workers, pools cascade"))
        session.execute(text("update tenants set usage = 0, lift = 0"))
    engine = connect(database.worker_url)
    yield engine
    engine.dispose()


def claim(engine: Engine, pool: str = POOL, **how: object) -> Lease:
    with service_transaction(engine) as session:
        job = claims.claim_job(session, pool, worker_name="w", lease_seconds=3600, **how)  # type: ignore[arg-type]
    assert job is not None
    assert job.lease_token is not None
    return Lease(job.id, job.tenant_id, job.lease_token)


def train(owner: Engine, lease: Lease, *, steps: int = 1, seconds_ago: float = 0.0) -> None:
    """Let an attempt begin to step, so long ago, and do some steps."""
    with service_transaction(owner) as session:
        begin_steps(session, lease, step=0, total_steps=20_000)
    for step in range(1, steps + 1):
        record_step(owner, lease, step)
    change = "update attempts set stepping_at = now() - make_interval(secs => :ago) where lease_token = :token"
    with service_transaction(owner) as session:
        session.execute(text(change), {"ago": seconds_ago, "token": lease.token})


def hold_slots(owner: Engine, worker: Engine, tenant: Tenant, *, count: int, seconds_ago: float) -> list[Lease]:
    for _ in range(count):
        queue_job(owner, tenant.id)
    leases = [claim(worker) for _ in range(count)]
    for lease in leases:
        train(owner, lease, seconds_ago=seconds_ago)
    return leases


def set_usage(owner: Engine, tenant: Tenant, usage: float, **values: float) -> None:
    with service_transaction(owner) as session:
        row = session.get_one(TenantRow, tenant.id)
        row.usage_seconds, row.lift_seconds = usage, 0.0
        for name, value in values.items():
            setattr(row, name, value)


def lend(worker: Engine, held: Sequence[Lease]) -> int | None:
    loan = lend_to(worker, held, wanting=[])
    return loan.lease_token if loan is not None else None


def lend_to(worker: Engine, held: Sequence[Lease], *, wanting: Sequence[Lease]) -> Loan | None:
    tokens, wanted = ([lease.token for lease in leases] for leases in (held, wanting))
    with service_transaction(worker) as session:
        return turns.lend_slot(session, POOL, worker_name="w", held=tokens, terms=TERMS, wanting=wanted)


def choose(worker: Engine, *, pool: str | None, keeps_pool: bool, holders: Sequence[uuid.UUID] = ()) -> str | None:
    choice = PoolChoice("w", (POOL, NF4_POOL), pool, keeps_pool=keeps_pool, holders=tuple(holders))
    with service_transaction(worker) as session:
        return turns.choose_pool(session, choice)


def add_worker(owner: Engine, facts: WorkerFacts) -> None:
    with service_transaction(owner) as session:
        record_worker(session, facts, alive_seconds=60, is_start=True)


def broken(owner: Engine, promise: str) -> tuple[str, ...]:
    with service_transaction(owner) as session:
        (finding,) = (each for each in check_rows(session, FAIRNESS) if each.promise == promise)
    return finding.broken


# Slots


def test_a_slot_that_has_had_its_quantum_is_lent_to_a_tenant_that_used_less(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=3, seconds_ago=601)
    assert lend(worker, held) is None, "nobody waits"
    set_usage(owner, tenant, 5000)
    waiting = queue_job(owner, other_tenant.id)
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
    queue_job(owner, tenant.id)
    unstepped = claim(worker)
    train(owner, unstepped, steps=0, seconds_ago=900)
    queue_job(owner, tenant.id)
    loading = claim(worker)  # it has a slot and does not step yet
    queue_job(owner, other_tenant.id)
    assert lend(worker, [*young, unstepped, loading]) is None
    train(owner, young[0], seconds_ago=601)
    assert lend(worker, [*young, unstepped, loading]) == young[0].token


def test_slots_are_lent_to_lower_scores_only_and_not_for_a_small_difference(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    queue_job(owner, other_tenant.id)
    set_usage(owner, tenant, 1000)
    for usage, is_lent in ((1200, False), (1000, False), (970, False), (960, True)):
        set_usage(owner, other_tenant, usage)
        assert (lend(worker, held) is not None) is is_lent, usage


def test_a_weight_counts_in_who_lends(worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant) -> None:
    held = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    queue_job(owner, other_tenant.id)
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
    queue_job(owner, add_tenant(owner).id)
    assert lend(worker, [*mine, *whales]) == whales[0].token


def test_as_many_slots_are_lent_at_a_time_as_jobs_wait_that_may_start(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=4, seconds_ago=601)
    set_usage(owner, tenant, 5000)
    for _ in range(5):
        queue_job(owner, other_tenant.id)
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
    waiting = queue_job(owner, other_tenant.id)
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
        session.get_one(Job, waiting.id).run_after -= attempts.timedelta(seconds=61)
    assert lend(worker, held) is not None, "nobody has taken it"


def test_a_held_job_that_lacks_memory_is_lent_a_slot_of_a_tenant_that_used_more(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=2, seconds_ago=601)
    queue_job(owner, other_tenant.id)
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
    queue_job(owner, tenant.id)
    whales = claim(worker)
    set_usage(owner, tenant, 5000)
    queue_job(owner, other_tenant.id)
    assert lend_to(worker, held, wanting=[whales]) == Loan(held[0].token, None)
    others = claim(worker)
    assert others.tenant_id == other_tenant.id
    assert lend_to(worker, held, wanting=[whales, others]) == Loan(held[1].token, others.token)


def test_a_mark_that_its_worker_never_heard_of_lapses(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    set_usage(owner, tenant, 5000)
    queue_job(owner, other_tenant.id)
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
    later = [queue_job(owner, other_tenant.id).id for _ in range(5)]
    with service_transaction(owner) as session:
        session.execute(text("update jobs set run_after = now() + interval '1 h' where id = any(:ids)"), {"ids": later})
    assert lend(worker, held) is None
    queue_job(owner, other_tenant.id)
    assert [lend(worker, held) is not None for _ in range(2)] == [True, False]


def test_a_suspect_is_lent_a_slot_once_it_has_waited_and_holds_up_no_other_pool_before(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    set_usage(owner, tenant, 5000)
    suspect = queue_job(owner, other_tenant.id)
    waiting = queue_job(owner, add_tenant(owner).id, quantization="nf4")
    set_usage(owner, other_tenant, 0)
    with service_transaction(owner) as session:
        session.get_one(Job, suspect.id).suspect_step = 0
        session.execute(text("update tenants set usage = 100 where id = :id"), {"id": waiting.tenant_id})
    assert lend(worker, held) is None
    assert choose(worker, pool=POOL, keeps_pool=False, holders=[tenant.id]) == NF4_POOL
    with service_transaction(owner) as session:
        session.get_one(Job, suspect.id).run_after -= attempts.timedelta(seconds=61)
    assert choose(worker, pool=POOL, keeps_pool=False, holders=[tenant.id]) == POOL
    assert lend(worker, held) == held[0].token


def test_a_suspect_whose_slot_was_lent_is_not_taken_again_before_those_who_used_less(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    (suspect,) = hold_slots(owner, worker, tenant, count=1, seconds_ago=601)
    set_usage(owner, tenant, 5000)
    with service_transaction(owner) as session:
        session.get_one(Job, suspect.job_id).suspect_step = 0
    waiting = queue_job(owner, other_tenant.id)
    assert lend(worker, [suspect]) == suspect.token
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, suspect)
    assert claim(worker, is_idle=True).job_id == waiting.id


# Pools


def test_a_pool_keeps_its_worker_for_its_turn_and_then_the_fairest_job_decides(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    queue_job(owner, tenant.id)
    queue_job(owner, other_tenant.id, quantization="nf4")
    set_usage(owner, tenant, 1000)
    assert choose(worker, pool=POOL, keeps_pool=True) == POOL
    assert choose(worker, pool=POOL, keeps_pool=False) == NF4_POOL
    set_usage(owner, other_tenant, 2000)
    assert choose(worker, pool=POOL, keeps_pool=False) == POOL
    assert choose(worker, pool=None, keeps_pool=False) == POOL


def test_of_one_tenant_the_older_job_decides_between_pools(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant.id, quantization="nf4")
    for _ in range(10):
        queue_job(owner, tenant.id)
    assert choose(worker, pool=POOL, keeps_pool=False) == NF4_POOL
    queue_job(owner, tenant.id, priority=1)
    assert choose(worker, pool=POOL, keeps_pool=False) == POOL


def test_one_holder_that_used_less_keeps_no_pool_for_another_that_used_more(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    """A tenant that can use one slot only stays below its share for ever."""
    small = add_tenant(owner)
    queue_job(owner, other_tenant.id, quantization="nf4")
    set_usage(owner, other_tenant, 31_425)
    set_usage(owner, tenant, 31_500)
    set_usage(owner, small, 4_500)
    assert choose(worker, pool=POOL, keeps_pool=False, holders=[small.id]) == POOL
    assert choose(worker, pool=POOL, keeps_pool=False, holders=[tenant.id, small.id]) == NF4_POOL


def test_who_holds_slots_and_used_less_keeps_the_pool(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    queue_job(owner, other_tenant.id, quantization="nf4")
    set_usage(owner, other_tenant, 1000)
    for usage, expected in ((500, POOL), (1500, NF4_POOL)):
        set_usage(owner, tenant, usage)
        assert choose(worker, pool=POOL, keeps_pool=False, holders=[tenant.id]) == expected
    with service_transaction(owner) as session:
        session.execute(text("update jobs set status = 'paused' where status = 'queued'"))
    assert choose(worker, pool=POOL, keeps_pool=False, holders=[tenant.id]) == POOL
    assert choose(worker, pool=POOL, keeps_pool=False) is None


def test_one_worker_moves_for_one_job(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant.id, quantization="nf4")
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
        queue_job(owner, tenant.id)
    set_usage(owner, tenant, 0, max_running=slots)
    assert (moves("w"), moves("x")) == (True, False), "w has room for all of them"
    queue_job(owner, tenant.id)
    assert not moves("x"), "the tenant's quota lets no more start"
    set_usage(owner, tenant, 0, max_running=100)
    assert (moves("x"), moves("y")) == (True, False), "x has room for one more"
    add_worker(owner, WorkerFacts("w", (POOL,), "serving", POOL, slots, slots))
    assert (moves("y"), moves("z")) == (True, False), "w has no room any more, and y has"


# Newcomers


@pytest.fixture
def schedule(database: Database) -> Iterator[Engine]:
    engine = connect(database.schedule_url)
    yield engine
    engine.dispose()


def level(schedule: Engine) -> None:
    with service_transaction(schedule) as session:
        newcomers = charges.list_newcomers(session)
    for tenant_id in newcomers:
        with service_transaction(schedule) as session:
            charges.level_newcomer(session, tenant_id)
    with service_transaction(schedule) as session:
        assert charges.list_newcomers(session) == []


def account(owner: Engine, tenant: Tenant) -> float:
    with service_transaction(owner) as session:
        row = session.get_one(TenantRow, tenant.id)
        return (row.usage_seconds + row.lift_seconds) / row.weight


def test_a_newcomer_starts_a_quantum_of_a_slot_before_the_level_and_its_usage_stays_true(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=2, seconds_ago=0)
    level(schedule)
    set_usage(owner, tenant, 30_000)
    queue_job(owner, other_tenant.id)
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(30_000 - 75, rel=1e-3)
    with service_transaction(owner) as session:
        assert session.get_one(TenantRow, other_tenant.id).usage_seconds == 0
    assert claim(worker).tenant_id == other_tenant.id


def test_who_comes_back_is_not_behind_for_what_it_used_of_an_idle_device(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=2, seconds_ago=0)
    level(schedule)
    set_usage(owner, tenant, 1_000)
    set_usage(owner, other_tenant, 30_000)
    queue_job(owner, other_tenant.id)
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(1_000, rel=1e-3)
    queue_job(owner, tenant.id)
    assert account(owner, tenant) == pytest.approx(1_000, rel=1e-3)


def test_who_trains_or_waits_already_keeps_its_place(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=2, seconds_ago=0)
    hold_slots(owner, worker, other_tenant, count=1, seconds_ago=0)
    level(schedule)
    set_usage(owner, tenant, 10_000)
    set_usage(owner, other_tenant, 30_000)
    queue_job(owner, other_tenant.id)  # it trains, and nothing of it waited
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(30_000, rel=1e-3)
    set_usage(owner, other_tenant, 100)
    queue_job(owner, other_tenant.id)  # something of it waits
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(100, rel=1e-3)


def test_who_trained_a_moment_ago_is_not_forgiven_and_sets_the_level(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    """Else a tenant would lose what it used by coming with one job after another, and others would come before it."""
    (lease,) = hold_slots(owner, worker, tenant, count=1, seconds_ago=0)
    level(schedule)
    with service_transaction(worker) as session:
        attempts.fail_attempt(session, lease, code="over", message="Over.", is_job_fault=True)
    set_usage(owner, tenant, 50_000)
    hold_slots(owner, worker, other_tenant, count=1, seconds_ago=0)
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(50_000 - 75, rel=1e-2), "nobody trained just then"
    queue_job(owner, tenant.id)
    level(schedule)
    assert account(owner, tenant) == pytest.approx(50_000, rel=1e-2)
    with service_transaction(owner) as session:
        session.execute(text("update attempts set ended_at = now() - interval '2 h' where outcome is not null"))
    set_usage(owner, other_tenant, 1_000)
    with service_transaction(owner) as session:
        session.execute(text("update queues set is_new = true where tenant_id = :id"), {"id": tenant.id})
    level(schedule)
    assert account(owner, tenant) == pytest.approx(1_000, rel=1e-2), "it was away"


def test_who_resumes_has_no_credit_for_the_time_in_which_it_paused(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    job = queue_job(owner, other_tenant.id)
    with service_transaction(owner) as session:
        pause_job(session, other_tenant.id, job_id=job.id)
    level(schedule)
    hold_slots(owner, worker, tenant, count=1, seconds_ago=0)
    level(schedule)
    set_usage(owner, tenant, 30_000)
    with service_transaction(owner) as session:
        resume_job(session, other_tenant.id, job_id=job.id)
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(30_000 - 75, rel=1e-2)


def test_who_waits_in_one_pool_loses_nothing_by_a_job_in_another(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=1, seconds_ago=0)
    queue_job(owner, other_tenant.id)
    level(schedule)
    set_usage(owner, tenant, 30_000)
    set_usage(owner, other_tenant, 10_000)
    queue_job(owner, other_tenant.id, quantization="nf4")
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(10_000, rel=1e-3)


def test_the_greatest_difference_of_weights_and_uses_is_a_number(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=1, seconds_ago=0)
    level(schedule)
    set_usage(owner, tenant, 1e12, weight=0.01)
    set_usage(owner, other_tenant, 0, weight=1000)
    queue_job(owner, other_tenant.id)
    level(schedule)
    assert account(owner, other_tenant) > 0


def test_nobody_is_moved_where_nobody_else_trains(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=1, seconds_ago=0)
    set_usage(owner, tenant, 10_000)
    queue_job(owner, tenant.id)
    level(schedule)
    assert account(owner, tenant) == pytest.approx(10_000, rel=1e-3)


# Charges


def usage(owner: Engine, tenant: Tenant) -> float:
    with service_transaction(owner) as session:
        return session.get_one(TenantRow, tenant.id).usage_seconds


def test_a_claim_is_charged_what_its_steps_are_known_to_use_up_to_a_slots_quantum(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant.id)
    with service_transaction(owner) as session:
        session.get_one(Job, job.id).total_steps = 20_000
    lease = claim(worker)
    assert usage(owner, tenant) == pytest.approx(ENTRY_CHARGE_SECONDS), "nothing was measured yet"
    train(owner, lease, steps=10)
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, lease)
        charges.record_usage(session, lease.token, gpu_seconds=5.0, trained_tokens=1)
    assert usage(owner, tenant) == pytest.approx(5, abs=0.1)
    with service_transaction(owner) as session:
        assert session.get_one(Pool, POOL).step_seconds == pytest.approx(0.5)
    again = claim(worker)
    assert usage(owner, tenant) == pytest.approx(5 + 75, abs=0.1), "19,990 steps of half a second, up to a quantum"
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, again)
        charges.record_usage(session, again.token, gpu_seconds=0.0, trained_tokens=0)
    with service_transaction(owner) as session:
        session.get_one(Job, job.id).total_steps = 30
    claim(worker)
    assert usage(owner, tenant) == pytest.approx(5 + 20 * 0.5, abs=0.1), "20 steps"


def test_use_is_charged_as_it_grows_beyond_the_entry_charge_and_corrected_at_the_end(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    queue_job(owner, tenant.id)
    queue_job(owner, other_tenant.id)
    leases = {lease.tenant_id: lease for lease in (claim(worker), claim(worker))}
    mine, others = leases[tenant.id], leases[other_tenant.id]
    for used, charged in ((20.0, 60), (70.0, 70), (65.0, 70), (500.0, 500)):
        with service_transaction(worker) as session:
            charges.charge_use(session, {mine.token: used, others.token: 1.0})
        assert usage(owner, tenant) == pytest.approx(charged, abs=0.2), used
    assert usage(owner, other_tenant) == pytest.approx(60, abs=0.1)
    with service_transaction(worker) as session:
        charges.record_usage(session, mine.token, gpu_seconds=510.0, trained_tokens=1)
        charges.record_usage(session, others.token, gpu_seconds=2.0, trained_tokens=1)
        charges.charge_use(session, {mine.token: 510.0})
    assert usage(owner, tenant) == pytest.approx(510, abs=0.5)
    assert usage(owner, other_tenant) == pytest.approx(2, abs=0.1)


def test_a_months_quota_counts_what_running_attempts_have_used(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    set_usage(owner, tenant, 0, max_gpu_seconds_per_month=100)
    queue_job(owner, tenant.id)
    queue_job(owner, tenant.id)
    lease = claim(worker)
    with service_transaction(worker) as session:
        charges.charge_use(session, {lease.token: 101.0})
        assert claims.claim_job(session, POOL, worker_name="w", lease_seconds=60) is None


# What check-contract sees of it


@pytest.fixture
def waits_too_long(worker: Engine, owner: Engine, tenant: Tenant) -> uuid.UUID:
    """A job that has waited for an hour, in a pool that the worker w serves too."""
    assert worker
    job = queue_job(owner, tenant.id, quantization="nf4")
    add_worker(owner, WorkerFacts("w", (POOL, NF4_POOL), "serving", POOL, 8, 8))
    with service_transaction(owner) as session:
        session.execute(text("update jobs set run_after = now() - interval '1 hour'"))
    return job.id


@pytest.mark.usefixtures("waits_too_long")
def test_i9_finds_a_slot_that_a_tenant_which_used_more_holds_for_too_long(
    worker: Engine, owner: Engine, other_tenant: Tenant
) -> None:
    (lease,) = hold_slots(owner, worker, other_tenant, count=1, seconds_ago=3000)
    assert broken(owner, "I9") == (), "it has not used more"
    set_usage(owner, other_tenant, 5000)
    assert any("holds a slot of w" in found for found in broken(owner, "I9"))
    train(owner, lease, seconds_ago=60)
    assert not any("holds a slot of w" in found for found in broken(owner, "I9")), "its quantum has only begun"


@pytest.mark.usefixtures("waits_too_long")
def test_i9_finds_later_jobs_of_a_tenant_which_used_more(worker: Engine, owner: Engine, other_tenant: Tenant) -> None:
    hold_slots(owner, worker, other_tenant, count=1, seconds_ago=10)
    set_usage(owner, other_tenant, 5000)
    (found,) = broken(owner, "I9")
    assert "starts later jobs" in found


def test_i9_finds_an_older_job_whose_tenants_younger_ones_are_started(
    worker: Engine, owner: Engine, tenant: Tenant, waits_too_long: uuid.UUID
) -> None:
    """What was seen: an NF4 job waited while its tenant's later LoRA jobs came one after the other."""
    with service_transaction(owner) as session:
        session.execute(text("update tenants set max_running = 1 where id = :id"), {"id": tenant.id})
    hold_slots(owner, worker, tenant, count=1, seconds_ago=10)
    (found,) = broken(owner, "I9")
    assert found == f"job {waits_too_long} waits in {NF4_POOL} while w starts younger jobs of its tenant"


@pytest.mark.usefixtures("waits_too_long")
def test_i9_has_nothing_against_a_tenant_that_waits_for_its_own_quota(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, other_tenant, count=1, seconds_ago=3000)
    set_usage(owner, other_tenant, 5000)
    set_usage(owner, tenant, 0, max_running=0)
    assert broken(owner, "I9") == ()
