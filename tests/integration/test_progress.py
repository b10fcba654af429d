"""The steps and rows that a job reports are those that were done, however many attempts it took."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select, text

from core.db.models import Event, Job
from core.db.session import service_transaction
from core.domain.dataset_counts import DatasetCounts
from core.domain.leases import Lease
from core.services import attempts, claims, observations, resume_points
from core.services.turns import SlotTerms, lend_slot
from tests.factories.bases import POOL
from tests.factories.jobs import queue_job, record_step, start_job
from tests.factories.tenants import Tenant

TOTAL_STEPS = 6


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    """The worker's role on a queue that is empty of other tests' jobs."""
    empty_queue(owner)
    return worker


def empty_queue(owner: Engine) -> None:
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs cascade"))
        session.execute(text("update tenants set usage = 0, lift = 0"))


def begin(worker: Engine, lease: Lease, step: int, *, total_steps: int = TOTAL_STEPS) -> None:
    with service_transaction(worker) as session:
        resume_points.begin_steps(session, lease, step=step, total_steps=total_steps)


def skip(worker: Engine, lease: Lease, step: int) -> None:
    with service_transaction(worker) as session:
        observations.record_skipped_step(session, lease, step=step, total_steps=TOTAL_STEPS)


def requeue(worker: Engine, lease: Lease) -> Lease:
    """Give a job back and claim it again."""
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, lease)
    with service_transaction(worker) as session:
        job = claims.claim_job(session, POOL, worker_name="w", lease_seconds=3600)
    assert job is not None
    assert job.lease_token is not None
    return Lease(job.id, job.tenant_id, job.lease_token)


def read(owner: Engine, lease: Lease) -> Job:
    with service_transaction(owner) as session:
        return session.get_one(Job, lease.job_id)


def warnings(owner: Engine, lease: Lease) -> list[str]:
    query = select(Event.message).where(Event.job_id == lease.job_id, Event.level == "warn").order_by(Event.number)
    with service_transaction(owner) as session:
        return list(session.scalars(query))


def test_the_steps_of_a_job_are_those_that_its_rows_make_once_they_are_read(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    assert read(owner, lease).total_steps not in (0, 7)  # an estimate
    begin(worker, lease, 0, total_steps=7)
    assert read(owner, lease).total_steps == 7


def test_a_skipped_step_is_told_once_and_counts_as_done(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    lease = start_job(owner, tenant)
    begin(worker, lease, 0)
    record_step(worker, lease, 1)
    skip(worker, lease, 2)
    skip(worker, lease, 2)
    job = read(owner, lease)
    assert (job.trained_steps, job.skipped_steps) == (2, 1)
    assert warnings(owner, lease) == ["Step 2/6 was skipped: its gradient was not finite."]
    with service_transaction(owner) as session:
        told = session.scalars(select(Event).where(Event.job_id == lease.job_id, Event.level == "warn")).one()
    assert told.details == {"step": 2, "total_steps": 6, "is_skipped": True}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    skipped=st.sets(st.integers(1, TOTAL_STEPS)),
    stretches=st.lists(st.tuples(st.integers(0, TOTAL_STEPS), st.integers(0, TOTAL_STEPS)), max_size=3),
)
def test_whatever_is_skipped_and_however_often_a_job_starts_anew_each_step_is_counted_once(
    worker: Engine, owner: Engine, tenant: Tenant, skipped: set[int], stretches: Sequence[tuple[int, int]]
) -> None:
    """Each attempt but the last goes some steps and is given back; the next resumes from somewhere before."""
    empty_queue(owner)
    lease, at = start_job(owner, tenant), 0
    begin(worker, lease, 0)
    for num_steps, lost in (*stretches, (TOTAL_STEPS, 0)):
        for step in range(at + 1, min(TOTAL_STEPS, at + num_steps) + 1):
            skip(worker, lease, step) if step in skipped else record_step(worker, lease, step)
            at = step
        job = read(owner, lease)
        assert (job.trained_steps, job.skipped_steps) == (at, len({step for step in skipped if step <= at}))
        if at < TOTAL_STEPS:
            at = max(0, at - lost)
            lease = requeue(worker, lease)
            begin(worker, lease, at)
    for step in range(at + 1, TOTAL_STEPS + 1):
        skip(worker, lease, step) if step in skipped else record_step(worker, lease, step)
    job = read(owner, lease)
    assert (job.trained_steps, job.skipped_steps) == (job.total_steps, len(skipped))


def test_a_slot_in_which_the_last_step_was_skipped_is_lent_all_the_same(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    begin(worker, lease, 0)
    record_step(worker, lease, 1)
    skip(worker, lease, 2)
    skip(worker, lease, 3)
    with service_transaction(owner) as session:
        session.execute(text("update attempts set stepping_at = now() - interval '1 hour'"))
        session.execute(text("update tenants set usage = 1e6, usage_at = now() where id = :id"), {"id": tenant.id})
    queue_job(owner, other_tenant)
    with service_transaction(worker) as session:
        terms = SlotTerms(quantum_seconds=60, slot_seconds=60)
        loan = lend_slot(session, POOL, worker_name="w", held=[lease.token], terms=terms)
    assert loan is not None
    assert loan.lease_token == lease.token


def test_what_became_of_the_rows_is_on_the_job_and_warned_of_once_a_file(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    assert read(owner, lease).datasets is None
    counts = DatasetCounts(num_examples=10, num_truncated=1, num_dropped=2, num_left_out_turns=5)
    whole = DatasetCounts(num_examples=4, num_truncated=0, num_dropped=0, num_left_out_turns=0)
    for _ in range(3):  # attempts
        with service_transaction(worker) as session:
            attempts.record_datasets(session, lease, datasets={"training": counts, "validation": whole})
        lease = requeue(worker, lease)
    job = read(owner, lease)
    assert job.datasets == {"training": counts.model_dump(), "validation": whole.model_dump()}
    (told,) = warnings(owner, lease)
    assert told == (
        f"1 rows of the training file are longer than max_seq_len={job.spec['max_seq_len']} tokens and were truncated. "
        "2 rows of the training file had nothing to learn and were dropped. 5 answers of the training file are left out "
        "of the loss: the base's chat template writes them in a context that a server would not give it."
    )
