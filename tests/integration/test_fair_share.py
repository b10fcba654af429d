"""The order of claims: rows 26, 50 and 51, on the real claim in SQL, with the counts and ranks that it uses."""

from __future__ import annotations

import random
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, func, select, text

from core.db.models import Attempt, Job, Queue
from core.db.models import Tenant as TenantRow
from core.db.session import connect, service_transaction
from core.domain.failures import Failure
from core.domain.leases import Lease
from core.domain.scheduling import USAGE_HALF_LIFE_SECONDS, decay_usage
from core.services import attempts, charges, claims
from core.services.jobs import cancel_job
from tests.databases import Database
from tests.factories.bases import NF4_POOL, POOL
from tests.factories.jobs import claim, queue_job
from tests.factories.tenants import Tenant, add_tenant


@pytest.fixture
def worker(database: Database, owner: Engine) -> Iterator[Engine]:
    """The worker's role on queues that are empty of other tests' jobs."""
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs, queues cascade"))
        session.execute(text("update tenants set usage = 0"))
    engine = connect(database.worker_url, pool_size=20)
    yield engine
    engine.dispose()


def add_jobs(owner: Engine, tenant: Tenant, count: int) -> None:
    """Queue many copies of one submitted job."""
    first = queue_job(owner, tenant)
    copied = "tenant_id, base_model_id, pool, training_file_id, spec, total_steps, status"
    statement = f"insert into jobs (id, {copied}) select uuidv7(), {copied} from jobs, generate_series(2, :count) where id = :id"
    with service_transaction(owner) as session:
        session.execute(text(statement), {"count": count, "id": first.id})


def set_quota(owner: Engine, tenant: Tenant, **quota: int) -> None:
    with service_transaction(owner) as session:
        row = session.get_one(TenantRow, tenant.id)
        for name, value in quota.items():
            setattr(row, name, value)


def together(count: int, act):  # type: ignore[no-untyped-def]
    """Call `act(number)` in so many threads that wait for one another, and return what each returned."""
    barrier = threading.Barrier(count)

    def start(number: int):  # type: ignore[no-untyped-def]
        barrier.wait()
        return act(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


@pytest.mark.fault(26)
def test_row_26_one_wake_delivered_twenty_times_to_four_workers_is_one_claim_a_job(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    num_jobs = 12
    add_jobs(owner, tenant, num_jobs)
    set_quota(owner, tenant, max_running=7)
    too_many = threading.Event()

    def deliver(_number: int) -> list[uuid.UUID]:
        claimed = []
        for _ in range(20):
            if (lease := claim(worker)) is not None:
                claimed.append(lease.job_id)
                if count_running(owner, tenant) > 7:
                    too_many.set()
        return claimed

    taken = [job_id for claimed in together(4, deliver) for job_id in claimed]
    # Who meets another's claim under way passes it by; what is left then is the next wake-up's.
    taken += deliver(4)
    assert len(taken) == len(set(taken)) == 7
    assert not too_many.is_set()
    with service_transaction(owner) as session:
        assert session.scalar(select(func.count()).select_from(Attempt)) == 7


def move_half_to_another_pool(owner: Engine) -> None:
    with service_transaction(owner) as session:
        session.execute(text("delete from queues"))
        moved = "update jobs set pool = :pool where id in (select id from jobs order by random() limit (select count(*) / 2 from jobs))"
        session.execute(text(moved), {"pool": NF4_POOL})
        counted = """insert into queues (tenant_id, pool, num_queued, rank)
            select tenant_id, pool, count(*), '-infinity' from jobs group by tenant_id, pool"""
        session.execute(text(counted))


def claim_from(engine: Engine, pool: str) -> Lease | None:
    with service_transaction(engine) as session:
        job = claims.claim_job(session, pool, worker_name="w", lease_seconds=60)
    return Lease(job.id, job.tenant_id, job.lease_token) if job and job.lease_token else None


@pytest.mark.fault(50)
def test_row_50_a_quota_is_one_for_all_pools_while_a_claim_is_not_committed(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    add_jobs(owner, tenant, 10)
    move_half_to_another_pool(owner)
    set_quota(owner, tenant, max_running=1)
    with service_transaction(worker) as session:
        assert claims.claim_job(session, POOL, worker_name="w", lease_seconds=60) is not None
        assert claim_from(worker, NF4_POOL) is None
    assert claim_from(worker, NF4_POOL) is None


@pytest.mark.fault(50)
def test_row_50_four_claimers_of_two_pools_never_pass_a_quota_of_one(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    add_jobs(owner, tenant, 10)
    move_half_to_another_pool(owner)
    set_quota(owner, tenant, max_running=1)
    for _ in range(60):
        taken = [lease for lease in together(4, lambda n: claim_from(worker, (POOL, NF4_POOL)[n % 2])) if lease]
        assert len(taken) == 1
        with service_transaction(worker) as session:
            attempts.requeue_attempt(session, taken[0])


def count_running(owner: Engine, tenant: Tenant) -> int:
    query = select(func.count()).where(Job.tenant_id == tenant.id, Job.status == "running")
    with service_transaction(owner) as session:
        return session.scalars(query).one()


def test_a_quota_that_holds_one_tenant_up_holds_no_other(worker: Engine, owner: Engine) -> None:
    blocked, other = add_tenant(owner), add_tenant(owner)
    add_jobs(owner, blocked, 3)
    add_jobs(owner, other, 1)
    set_quota(owner, blocked, max_running=0)
    lease = claim(worker)
    assert lease is not None
    assert lease.tenant_id == other.id
    assert claim(worker) is None


@pytest.mark.parametrize(
    "block",
    ["max_running = 0", "disabled_at = now()", "max_gpu_seconds_per_month = 0"],
    ids=["quota", "disabled", "month"],
)
def test_a_pool_whose_jobs_may_not_start_keeps_no_worker_from_another_pool(
    worker: Engine, owner: Engine, database: Database, block: str
) -> None:
    blocked, other = add_tenant(owner), add_tenant(owner)
    queue_job(owner, blocked)
    with service_transaction(owner) as session:
        session.execute(text(f"update tenants set {block} where id = :id"), {"id": blocked.id})
    queue_job(owner, other, quantization="nf4")
    schedule = connect(database.schedule_url)
    for engine in (worker, schedule):
        with service_transaction(engine) as session:
            assert claims.claimable_pools(session) == [NF4_POOL]
    schedule.dispose()


def test_a_job_whose_retry_is_not_due_holds_nobody_up_and_wakes_nobody(worker: Engine, owner: Engine) -> None:
    waiting, other = add_tenant(owner), add_tenant(owner)
    later = queue_job(owner, waiting)
    with service_transaction(owner) as session:
        session.get_one(Job, later.id).run_after = func.now() + text("interval '1 hour'")
        session.flush()
        assert claims.claimable_pools(session) == []
    add_jobs(owner, other, 1)
    with service_transaction(worker) as session:
        assert claims.claimable_pools(session) == [POOL]
    lease = claim(worker)
    assert lease is not None
    assert lease.tenant_id == other.id


def test_queues_count_what_is_queued_through_every_change_and_all_roles(
    worker: Engine, owner: Engine, database: Database
) -> None:
    tenants = [add_tenant(owner) for _ in range(3)]
    for tenant in tenants:
        add_jobs(owner, tenant, 5)
    leases = [lease for _ in range(9) if (lease := claim(worker))]
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, leases[0])
    with service_transaction(worker) as session:
        attempts.fail_attempt(session, leases[1], failure=Failure(code="x", message="x"), is_job_fault=False)
    with service_transaction(worker) as session:
        attempts.fail_attempt(session, leases[2], failure=Failure(code="x", message="x"), is_job_fault=True)
    queued = queue_job(owner, tenants[0])
    with service_transaction(owner) as session:
        cancel_job(session, tenants[0].id, job_id=queued.id)
        session.execute(
            text("update jobs set lease_until = now() - interval '1 s' where id = :id"), {"id": leases[3].job_id}
        )
    schedule = connect(database.schedule_url)
    with service_transaction(schedule) as session:
        assert attempts.expire_leases(session) == 1
    schedule.dispose()
    with service_transaction(owner) as session:
        counted = dict(session.execute(select(Queue.tenant_id, Queue.num_queued)).all())
        actual = select(Job.tenant_id, func.count()).where(Job.status == "queued").group_by(Job.tenant_id)
        assert counted == dict(session.execute(actual).all())
        assert sum(counted.values()) == 15 - 9 + 3


@pytest.mark.usefixtures("worker")
def test_the_rank_of_queues_orders_tenants_as_their_decayed_usages_do_at_any_time(owner: Engine) -> None:
    draw = random.Random(4)
    shares = {}
    for _ in range(12):
        tenant = add_tenant(owner)
        usage, age, weight = draw.uniform(1, 1e6), draw.uniform(0, 30 * 3600), draw.choice([0.5, 1.0, 3.0])
        set_usage = (
            "update tenants set usage = :u, usage_at = now() - make_interval(secs => :a), weight = :w where id = :id"
        )
        if draw.random() < 0.5:
            queue_job(owner, tenant)
        with service_transaction(owner) as session:
            session.execute(text(set_usage), {"u": usage, "a": age, "w": weight, "id": tenant.id})
        queue_job(owner, tenant)
        shares[tenant.id] = decay_usage(usage, age) / weight
    with service_transaction(owner) as session:
        ranked = session.scalars(select(Queue.tenant_id).order_by(Queue.rank)).all()
    assert list(ranked) == sorted(shares, key=shares.__getitem__)


def test_the_half_life_of_ranks_is_the_domains(owner: Engine) -> None:
    query = "select share_rank(8, now(), 2) - share_rank(8, now() - make_interval(secs => :half), 1)"
    with service_transaction(owner) as session:
        assert session.scalar(text(query), {"half": USAGE_HALF_LIFE_SECONDS}) == pytest.approx(0, abs=1e-6)


class Clock:
    """Time that a test moves on: shifts every instant in the rows into the past, which the database's clock cannot tell."""

    def __init__(self, owner: Engine) -> None:
        self._owner = owner
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds
        with service_transaction(self._owner) as session:
            session.execute(text("update tenants set usage_at = usage_at - make_interval(secs => :s)"), {"s": seconds})


@pytest.mark.fault(51)
def test_row_51_a_whale_keeps_no_small_tenant_waiting(worker: Engine, owner: Engine) -> None:
    """Eight devices for twelve hours: a whale with 600 jobs at the start, two small tenants with a job an hour each."""
    whale, *small = (add_tenant(owner) for _ in range(3))
    set_quota(owner, whale, max_running=100)
    add_jobs(owner, whale, 600)
    draw, clock = random.Random(51), Clock(owner)
    busy: list[tuple[float, float, Lease]] = []  # until when, GPU-seconds, what
    submitted: dict[uuid.UUID, float] = {}
    waits: list[float] = []
    started: Counter[uuid.UUID] = Counter()
    arrivals = sorted((hour * 3600 + draw.uniform(0, 3600), tenant) for hour in range(12) for tenant in small)
    while clock.now < 12 * 3600:
        while len(busy) < 8 and (lease := claim(worker)) is not None:
            seconds = draw.uniform(300, 1500)
            busy.append((clock.now + seconds, seconds, lease))
            started[lease.tenant_id] += 1
            if lease.job_id in submitted:
                waits.append(clock.now - submitted[lease.job_id])
        busy.sort(key=lambda held: held[0])
        if arrivals and arrivals[0][0] <= busy[0][0]:
            at, tenant = arrivals.pop(0)
            clock.advance(at - clock.now)
            submitted[queue_job(owner, tenant).id] = clock.now
        else:
            until, seconds, lease = busy.pop(0)
            clock.advance(until - clock.now)
            with service_transaction(worker) as session:
                attempts.fail_attempt(session, lease, failure=Failure(code="done", message="Done."), is_job_fault=True)
            with service_transaction(worker) as session:
                charges.record_usage(session, lease.token, gpu_seconds=seconds, trained_tokens=1)
    assert len(waits) >= 22, "every small job that could start has started"
    # The next device that comes free is theirs: mostly within a couple of minutes, never more than 13 (see docs/contract.md).
    assert sorted(waits)[len(waits) // 2] <= 150
    assert max(waits) <= 13 * 60
    assert started[whale.id] > 200, "the devices that the small ones do not need are the whale's"
