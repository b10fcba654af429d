"""Pause, resume, suspicion and resume points in SQL: race-free against claim, end and each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from sqlalchemy import Engine, text

from core.db.models import Job
from core.db.session import ServiceSession, service_transaction, tenant_transaction
from core.domain.errors import ConflictError
from core.domain.failures import Failure
from core.domain.leases import Lease, StaleLeaseError
from core.domain.values import StoredArtifact, StoredFile
from core.services import attempts, checkpoints, claims, leases, observations, resume_points
from core.services.jobs import cancel_job, pause_job, resume_job
from core.services.observations import StepRecord
from tests.databases import run
from tests.factories.bases import POOL
from tests.factories.jobs import claim, make_claimable, queue_job, status_of
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    """The worker's role on a queue that is empty of other tests' jobs."""
    run(owner, "truncate jobs cascade")
    run(owner, "update tenants set usage = 0")
    return worker


def pause(owner: Engine, tenant: Tenant, job: Job) -> str:
    with any_role_transaction(owner) as session:
        return pause_job(session, tenant.id, job_id=job.id).status


def resume(owner: Engine, tenant: Tenant, job: Job) -> str:
    with any_role_transaction(owner) as session:
        return resume_job(session, tenant.id, job_id=job.id).status


def must_claim(worker: Engine, *, lease_seconds: float = 60) -> Lease:
    lease = claim(worker, lease_seconds)
    assert lease is not None
    return lease


def beat(worker: Engine, lease: Lease) -> bool:
    with service_transaction(worker) as session:
        return leases.heartbeat(session, lease, lease_seconds=60)


def requeue(worker: Engine, lease: Lease) -> None:
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, lease)


def test_a_queued_job_is_paused_at_once_is_not_claimed_and_comes_back_at_its_place(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    first, second = queue_job(owner, tenant), queue_job(owner, tenant)
    assert [pause(owner, tenant, first) for _ in range(2)] == ["paused", "paused"]
    assert must_claim(worker).job_id == second.id
    assert claim(worker) is None
    third = queue_job(owner, tenant)
    assert [resume(owner, tenant, first) for _ in range(2)] == ["queued", "queued"]
    assert [must_claim(worker).job_id for _ in range(2)] == [first.id, third.id]


@pytest.mark.parametrize(("set_to", "expected"), [("- interval '7 days'", 0.0), ("+ interval '1 hour'", 3600.0)])
def test_a_job_waits_from_its_resumption_and_not_from_before_its_pause(
    api: Engine, worker: Engine, owner: Engine, tenant: Tenant, set_to: str, expected: float
) -> None:
    job = queue_job(owner, tenant)
    with service_transaction(owner) as session:
        session.execute(text(f"update jobs set run_after = now() {set_to} where id = :id"), {"id": job.id})
    for change in (pause_job, resume_job):
        with tenant_transaction(api, tenant.id) as session:
            change(session, tenant.id, job_id=job.id)
    with service_transaction(owner) as session:
        query = text("select extract(epoch from run_after - now())::float8 from jobs where id = :id")
        due_in = session.scalars(query, {"id": job.id}).one()
    assert due_in == pytest.approx(expected, abs=60)
    assert (claim(worker) is None) == (expected > 0)


def test_a_running_job_is_asked_to_pause_and_is_paused_when_its_worker_gives_it_back(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    lease = must_claim(worker)
    assert not beat(worker, lease)
    assert pause(owner, tenant, job) == "running"
    assert beat(worker, lease)
    requeue(worker, lease)
    assert status_of(owner, lease) == "paused"
    with pytest.raises(StaleLeaseError):
        requeue(worker, lease)
    assert resume(owner, tenant, job) == "queued"


def test_a_job_resumed_before_it_has_paused_is_queued_again_when_it_is_given_back(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    lease = must_claim(worker)
    pause(owner, tenant, job)
    assert resume(owner, tenant, job) == "running"
    assert not beat(worker, lease)
    requeue(worker, lease)
    assert status_of(owner, lease) == "queued"


def test_a_job_whose_worker_is_lost_while_it_pauses_is_paused(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    job = queue_job(owner, tenant)
    lease = must_claim(worker, lease_seconds=-1)
    pause(owner, tenant, job)
    with service_transaction(owner) as session:
        assert attempts.expire_leases(session) == 1
    assert status_of(owner, lease) == "paused"


def test_a_job_that_has_ended_is_neither_paused_nor_resumed_and_a_pausing_one_can_be_cancelled(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    must_claim(worker)
    pause(owner, tenant, job)
    with service_transaction(owner) as session:
        assert cancel_job(session, tenant.id, job_id=job.id).status == "cancelled"
    for verb in (pause, resume):
        with pytest.raises(ConflictError):
            verb(owner, tenant, job)


def suspect(worker: Engine, lease: Lease) -> None:
    with service_transaction(worker) as session:
        attempts.suspect_attempt(session, lease, failure=Failure(code="trainer_crashed", message="It crashed."))


CRASH = Failure(code="x", message="x")


@pytest.mark.parametrize(
    "end",
    [
        attempts.requeue_attempt,
        partial(attempts.postpone_attempt, failure=CRASH),
        partial(attempts.suspect_attempt, failure=CRASH),
        partial(attempts.fail_attempt, failure=CRASH, is_job_fault=False),
    ],
    ids=["requeued", "postponed", "suspected", "failed"],
)
def test_however_an_attempt_ends_its_job_pauses_if_that_was_asked(
    worker: Engine, owner: Engine, tenant: Tenant, end: Callable[[ServiceSession, Lease], None]
) -> None:
    job = queue_job(owner, tenant)
    lease = must_claim(worker)
    pause(owner, tenant, job)
    with service_transaction(worker) as session:
        end(session, lease)
    with service_transaction(owner) as session:
        assert session.get_one(Job, job.id).status == "paused"


def claim_idle(worker: Engine, *, is_idle: bool) -> Lease | None:
    with service_transaction(worker) as session:
        job = claims.claim_job(session, POOL, worker_name="w", lease_seconds=60, is_idle=is_idle)
    return None if job is None or job.lease_token is None else Lease(job.id, job.tenant_id, job.lease_token)


def test_a_suspect_is_not_charged_and_only_an_idle_worker_takes_it_and_first(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    first, second = queue_job(owner, tenant), queue_job(owner, tenant)
    held = [must_claim(worker), must_claim(worker)]
    for lease in held:
        suspect(worker, lease)
    other = queue_job(owner, tenant, priority=9)
    busy = claim_idle(worker, is_idle=False)
    assert busy is not None
    assert busy.job_id == other.id
    assert claim_idle(worker, is_idle=False) is None
    tried = claim_idle(worker, is_idle=True)
    assert tried is not None
    assert tried.job_id == first.id
    with service_transaction(owner) as session:
        assert session.get_one(Job, first.id).attempt_count == 1
        assert session.get_one(Job, second.id).attempt_count == 0
    with service_transaction(worker) as session:
        assert attempts.acquit_job(session, tried), "the second waits for its trial"
    requeue(worker, tried)
    assert claim_idle(worker, is_idle=False) is not None, "an acquitted job trains beside others"


def test_a_suspect_that_no_worker_is_idle_for_is_given_to_a_busy_one_after_a_while(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    suspect(worker, must_claim(worker))
    assert claim_idle(worker, is_idle=False) is None
    with service_transaction(owner) as session:
        session.execute(text("update jobs set run_after = now() - interval '61 seconds'"))
        session.execute(text("update tenants set usage = 0, lift = 0"))  # no other test's tenant comes first
    queue_job(owner, tenant, priority=9)
    lease = claim_idle(worker, is_idle=False)
    assert lease is not None
    assert lease.job_id == job.id


@pytest.mark.fault(19)
def test_an_attempt_without_its_object_store_counts_for_nothing(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    job = queue_job(owner, tenant)
    for _ in range(5):  # more than a job has attempts
        lease = must_claim(worker)
        with service_transaction(worker) as session:
            attempts.postpone_attempt(
                session, lease, failure=Failure(code="storage_unavailable", message="It is away.")
            )
        with service_transaction(owner) as session:
            row = session.get_one(Job, job.id)
            assert (row.status, row.attempt_count) == ("queued", 0)
            session.execute(text("update jobs set run_after = now()"))


def test_a_checkpoint_stays_published_when_another_attempt_comes_to_its_step_again(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    def record(lease: Lease) -> tuple[str, ...]:
        artifact = StoredArtifact(f"p/{lease.token}/", ())
        with service_transaction(worker) as session:
            return checkpoints.record_checkpoint(session, lease, step=4, artifact=artifact, metrics={})

    queue_job(owner, tenant)
    first = must_claim(worker)
    assert (record(first), record(first)) == ((), ())
    requeue(worker, first)
    second = must_claim(worker)
    with service_transaction(worker) as session:
        resume_points.begin_steps(session, second, step=0, total_steps=100)
    assert record(second) == (f"p/{second.token}/",), "what the second has stored is named by no row"
    with service_transaction(owner) as session:
        assert session.execute(text("select lease_token from checkpoints")).all() == [(first.token,)]


def record_step(worker: Engine, lease: Lease, step: int) -> None:
    record = StepRecord(step, 1.0, train_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, num_tokens=10)
    with service_transaction(worker) as session:
        observations.record_step(session, lease, record=record, total_steps=100)


def record_point(worker: Engine, lease: Lease, step: int) -> tuple[str, ...]:
    with service_transaction(worker) as session:
        artifact = StoredArtifact(f"p/{lease.token}/{step}/", (StoredFile(name="a", size_bytes=1, sha256="0" * 64),))
        return resume_points.record_resume_point(session, lease, step=step, artifact=artifact)


def points(worker: Engine, lease: Lease) -> list[int]:
    with service_transaction(worker) as session:
        return [point.step for point in resume_points.list_resume_points(session, lease)]


def test_two_resume_points_are_kept_and_what_went_is_named_for_deletion(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    lease = must_claim(worker)
    gone = [record_point(worker, lease, step) for step in (5, 10, 10, 15)]
    assert gone == [(), (), (), (f"p/{lease.token}/5/",)]
    assert points(worker, lease) == [15, 10]


def test_a_new_attempt_drops_what_was_shown_beyond_its_resume_point_and_keeps_the_rest(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    first = must_claim(worker)
    for step in range(1, 8):
        record_step(worker, first, step)
    record_step(worker, first, 7)  # told twice, stored once
    record_point(worker, first, 3)
    record_point(worker, first, 6)
    requeue(worker, first)
    make_claimable(owner, first)
    second = must_claim(worker)
    with service_transaction(worker) as session:
        assert resume_points.begin_steps(session, second, step=3, total_steps=100) == (f"p/{first.token}/6/",)
    record_step(worker, second, 4)
    with service_transaction(owner) as session:
        rows = session.execute(text("select step, lease_token from metrics order by step")).all()
        assert [tuple(row) for row in rows] == [(1, first.token), (2, first.token), (3, first.token), (4, second.token)]
    assert points(worker, second) == [3]
    with pytest.raises(StaleLeaseError):
        record_point(worker, first, 7)
