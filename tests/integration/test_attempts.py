"""Claims and fences: only the newest attempt may end a job, and quotas hold under concurrent claims."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, func, select, text

from core.db.models import Attempt, Job, Usage
from core.db.session import ServiceSession, service_transaction
from core.domain.failures import Failure
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.jobs import MAX_UNCOUNTED
from core.domain.leases import Lease, StaleLeaseError
from core.domain.objects import attempt_prefix, file_key
from core.domain.values import StoredArtifact
from core.services import attempts, charges, claims, leases, observations
from core.services.jobs import cancel_job
from core.services.observations import StepRecord
from core.services.resume_points import begin_steps
from tests.databases import run
from tests.factories.bases import POOL
from tests.factories.jobs import claim, make_claimable, queue_job, status_of
from tests.factories.tenants import Tenant, add_tenant


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    """The worker's role on a queue that is empty of other tests' jobs."""
    run(owner, "truncate jobs cascade")
    run(owner, "update tenants set usage = 0")
    return worker


def test_a_stale_attempt_cannot_end_the_job_of_a_newer_one(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant)
    stale = claim(worker, lease_seconds=-1)
    assert stale is not None
    with service_transaction(owner) as session:
        assert attempts.expire_leases(session) == 1
    make_claimable(owner, stale)
    newer = claim(worker)
    assert newer is not None
    assert newer.job_id == stale.job_id
    for act in (
        lambda session: attempts.fail_attempt(
            session, stale, failure=Failure(code="x", message="x"), is_job_fault=True
        ),
        lambda session: leases.heartbeat(session, stale, lease_seconds=60),
        lambda session: attempts.requeue_attempt(session, stale),
        lambda session: attempts.record_message(session, stale, message="x", level="info"),
    ):
        with pytest.raises(StaleLeaseError), service_transaction(worker) as session:
            act(session)
    assert status_of(owner, newer) == "running"
    with service_transaction(worker) as session:
        leases.heartbeat(session, newer, lease_seconds=60)


def test_a_live_lease_does_not_expire(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant)
    lease = claim(worker)
    assert lease is not None
    with service_transaction(owner) as session:
        assert attempts.expire_leases(session) == 0
    assert status_of(owner, lease) == "running"


def test_our_fault_is_tried_again_up_to_the_maximum(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant)
    statuses = []
    for _ in range(3):
        lease = claim(worker)
        assert lease is not None
        with service_transaction(worker) as session:
            attempts.fail_attempt(
                session, lease, failure=Failure(code="trainer_crashed", message="It crashed."), is_job_fault=False
            )
        statuses.append(status_of(owner, lease))
        make_claimable(owner, lease)
    assert statuses == ["queued", "queued", "failed"]
    assert claim(worker) is None


def test_the_jobs_own_fault_is_final(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant)
    lease = claim(worker)
    assert lease is not None
    with service_transaction(worker) as session:
        attempts.fail_attempt(
            session, lease, failure=Failure(code="diverged", message="It diverged."), is_job_fault=True
        )
    assert status_of(owner, lease) == "failed"


def test_a_preempted_attempt_does_not_count(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    job = queue_job(owner, tenant)
    for _ in range(5):
        lease = claim(worker)
        assert lease is not None
        with service_transaction(worker) as session:
            attempts.requeue_attempt(session, lease)
    with service_transaction(owner) as session:
        assert session.get_one(Job, job.id).attempt_count == 0


def end_uncounted(session: ServiceSession, lease: Lease, how: str) -> None:
    match how:
        case "given back":
            attempts.requeue_attempt(session, lease)
        case "postponed":
            attempts.postpone_attempt(
                session, lease, failure=Failure(code="storage_unavailable", message="It is away.")
            )
        case "suspected":
            attempts.suspect_attempt(session, lease, failure=Failure(code="trainer_killed", message="It was killed."))


def claim_at_once(worker: Engine, owner: Engine, job: Job, *, lease_seconds: float = 60) -> Lease:
    """Claim a job as an idle worker does, without a pause after its last attempt."""
    make_claimable(owner, Lease(job.id, job.tenant_id, 0))
    with service_transaction(worker) as session:
        claimed = claims.claim_job(session, POOL, worker_name="w", lease_seconds=lease_seconds, is_idle=True)
    assert claimed is not None
    assert claimed.lease_token is not None
    return Lease(job.id, job.tenant_id, claimed.lease_token)


def set_uncounted(owner: Engine, num: int) -> None:
    with service_transaction(owner) as session:
        session.execute(text("update jobs set num_uncounted = :num"), {"num": num})


def read_job(owner: Engine, job: Job) -> Job:
    with service_transaction(owner) as session:
        return session.get_one(Job, job.id)


@pytest.mark.parametrize(
    ("how", "code"),
    [("given back", "no_progress"), ("postponed", "storage_unavailable"), ("suspected", "trainer_killed")],
)
def test_attempts_that_do_not_count_have_an_end(
    how: str, code: str, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    set_uncounted(owner, MAX_UNCOUNTED - 1)
    counts = []
    for _ in range(4):
        lease = claim_at_once(worker, owner, job)
        with service_transaction(worker) as session:
            end_uncounted(session, lease, how)
        counts.append(read_job(owner, job).attempt_count)
    assert counts == [0, 1, 2, 3], "the first is the last that does not count"
    ended = read_job(owner, job)
    assert ended.error is not None
    assert (ended.status, ended.error["code"]) == ("failed", code)


def test_a_step_that_no_attempt_has_come_to_yet_begins_a_new_row_of_attempts_that_do_not_count(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    step = StepRecord(step=1, train_loss=1.0, train_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, num_tokens=1)
    counted = []
    for _ in range(2):  # the second has no resume point, and comes to the same step again
        lease = claim_at_once(worker, owner, job)
        set_uncounted(owner, MAX_UNCOUNTED)
        with service_transaction(worker) as session:
            begin_steps(session, lease, step=0, total_steps=4)
            observations.record_step(session, lease, record=step, total_steps=4)
        with service_transaction(worker) as session:
            attempts.requeue_attempt(session, lease)
        counted.append(read_job(owner, job).attempt_count)
    assert counted == [0, 1]


def test_as_often_as_its_tenant_pauses_a_job_that_does_not_count(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    job = queue_job(owner, tenant)
    lease = claim_at_once(worker, owner, job)
    set_uncounted(owner, MAX_UNCOUNTED)
    with service_transaction(owner) as session:
        session.execute(text("update jobs set pause_requested_at = now()"))
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, lease)
    paused = read_job(owner, job)
    assert (paused.status, paused.attempt_count) == ("paused", 0)


def lose(worker: Engine, owner: Engine, job: Job) -> Lease:
    """Claim a job and let its lease run out."""
    lease = claim_at_once(worker, owner, job, lease_seconds=-1)
    with service_transaction(owner) as session:
        assert attempts.expire_leases(session) == 1
    return lease


def test_a_worker_that_was_cut_off_and_says_so_costs_no_attempt_and_one_that_is_dead_does(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    for _ in range(4):
        cut_off = lose(worker, owner, job)
        assert read_job(owner, job).attempt_count == 1
        newer = claim_at_once(worker, owner, job)
        with service_transaction(worker) as session:
            assert attempts.uncount_lost_attempt(session, cut_off)
            assert not attempts.uncount_lost_attempt(session, cut_off), "once"
            assert not attempts.uncount_lost_attempt(session, newer), "it is not lost"
        running = read_job(owner, job)
        assert (running.status, running.attempt_count) == ("running", 1)
        with service_transaction(worker) as session:
            attempts.requeue_attempt(session, newer)
        assert read_job(owner, job).attempt_count == 0
    for _ in range(3):
        dead = lose(worker, owner, job)
    failed = read_job(owner, job)
    assert failed.error is not None
    assert (failed.status, failed.error["code"]) == ("failed", "worker_lost")
    with service_transaction(worker) as session:
        assert not attempts.uncount_lost_attempt(session, dead), "what has ended stays as it ended"


def test_a_worker_that_is_cut_off_again_and_again_without_a_step_is_charged_in_the_end(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    cut_off = lose(worker, owner, job)
    set_uncounted(owner, MAX_UNCOUNTED)
    with service_transaction(worker) as session:
        assert not attempts.uncount_lost_attempt(session, cut_off)
    assert read_job(owner, job).attempt_count == 1


def test_a_cancelled_job_is_stale_for_its_worker(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    job = queue_job(owner, tenant)
    lease = claim(worker)
    assert lease is not None
    with service_transaction(owner) as session:
        assert cancel_job(session, tenant.id, job_id=job.id).status == "cancelled"
    with pytest.raises(StaleLeaseError), service_transaction(worker) as session:
        leases.heartbeat(session, lease, lease_seconds=60)


ENDINGS: dict[str, Callable[[ServiceSession, Lease], object]] = {
    "cancel": lambda session, lease: cancel_job(session, lease.tenant_id, job_id=lease.job_id),
    "fail": lambda session, lease: attempts.fail_attempt(
        session, lease, failure=Failure(code="x", message="x"), is_job_fault=True
    ),
    "succeed": lambda session, lease: attempts.succeed_attempt(
        session,
        lease,
        adapter=StoredArtifact(attempt_prefix(lease.tenant_id, lease.job_id, lease.token), files=()),
        result_file=NewFile(new_id(), "r", "fine-tune-results", file_key(lease.tenant_id, new_id()), 1, "0" * 64),
        trained_tokens=1,
    ),
}


@pytest.mark.parametrize("end", ENDINGS.values(), ids=ENDINGS)
def test_a_job_ends_after_all_that_was_written_of_it_however_early_its_transaction_began(
    worker: Engine, owner: Engine, tenant: Tenant, end: Callable[[ServiceSession, Lease], object]
) -> None:
    queue_job(owner, tenant)
    with service_transaction(owner) as ending:
        ending.execute(text("select 1"))  # the moment of now()
        lease = claim(worker)
        assert lease is not None
        step = StepRecord(
            step=1, train_loss=1.0, train_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, num_tokens=1
        )
        with service_transaction(worker) as session:
            observations.record_step(session, lease, record=step, total_steps=2)
        end(ending, lease)
    query = """select min(j.finished_at - m.created_at), min(a.ended_at - a.started_at)
        from jobs j join metrics m on m.job_id = j.id join attempts a on a.job_id = j.id where j.id = :id"""
    with service_transaction(owner) as session:
        after_the_step, after_the_start = session.execute(text(query), {"id": lease.job_id}).one()
    assert min(after_the_step, after_the_start) > dt.timedelta(0)


def test_a_quota_of_one_holds_under_concurrent_claims(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    for _ in range(8):
        queue_job(owner, tenant)
    with service_transaction(owner) as session:
        session.execute(text("update tenants set max_running = 1 where id = :id"), {"id": tenant.id})
    barrier = threading.Barrier(8)

    def claim_together() -> Lease | None:
        barrier.wait()
        return claim(worker)

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: claim_together(), range(8)))
    assert sum(lease is not None for lease in taken) == 1


def test_tenants_take_turns_however_many_jobs_one_has(worker: Engine, owner: Engine) -> None:
    whale, small = add_tenant(owner), add_tenant(owner)
    for _ in range(6):
        queue_job(owner, whale)
    queue_job(owner, small)
    first, second = claim(worker), claim(worker)
    assert first is not None
    assert second is not None
    assert {first.tenant_id, second.tenant_id} == {whale.id, small.id}


def test_priority_orders_one_tenants_jobs(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant)
    urgent = queue_job(owner, tenant, priority=5)
    lease = claim(worker)
    assert lease is not None
    assert lease.job_id == urgent.id


def test_usage_is_booked_once(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant)
    lease = claim(worker)
    assert lease is not None
    for _ in range(2):
        with service_transaction(worker) as session:
            charges.record_usage(session, lease.token, gpu_seconds=7.0, trained_tokens=11)
    with service_transaction(owner) as session:
        booked = session.scalars(select(Usage).join(Attempt, Attempt.id == Usage.attempt_id)).all()
        assert [(row.gpu_seconds, row.trained_tokens) for row in booked] == [(7.0, 11)]
        assert session.scalar(select(func.count()).select_from(Usage)) == 1
