"""A job's life as a state machine on real PostgreSQL: the promises hold for any order of verbs, with stale fences too.

The machine lets time pass by moving instants in the rows into the past of the database's clock.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError

from core.db.models import Job
from core.db.session import connect, service_transaction
from core.domain.errors import ConflictError
from core.domain.failures import Failure
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.jobs import MAX_ATTEMPTS
from core.domain.leases import Lease, StaleLeaseError
from core.domain.objects import attempt_prefix
from core.domain.scheduling import FairnessTerms
from core.domain.values import StoredArtifact
from core.services import attempts, charges, claims, observations
from core.services.jobs import cancel_job, pause_job, resume_job
from core.services.leases import heartbeat
from core.services.observations import StepRecord
from core.services.promises import check_rows
from tests.databases import Database
from tests.factories.bases import POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant, add_tenant
from tests.sessions import any_role_transaction

TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Expected:
    """What the machine believes of a job."""

    tenant: Tenant
    status: str = "queued"
    attempt_count: int = 0
    token: int | None = None
    is_due: bool = True
    is_suspect: bool = False
    must_pause: bool = False
    is_expired: bool = False
    booked: dict[int, float] = field(default_factory=dict)


class JobMachine(RuleBasedStateMachine):
    """Holds every lease there ever was; which of them count is for the database to say, and for the model to know."""

    jobs = Bundle("jobs")
    leases = Bundle("leases")
    owner: Engine
    worker: Engine
    schedule: Engine
    tenants: tuple[Tenant, ...]

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[uuid.UUID, Expected] = {}
        with service_transaction(self.owner) as session:
            session.execute(text("truncate jobs, queues, files cascade"))
            session.execute(text("update tenants set usage = 0, max_running = 2"))

    @rule(target=jobs, number=st.integers(0, 1), priority=st.integers(0, 1))
    def submit(self, number: int, priority: int) -> uuid.UUID:
        tenant = self.tenants[number]
        job = queue_job(self.owner, tenant, priority=priority)
        self.expected[job.id] = Expected(tenant)
        return job.id

    @precondition(lambda self: any(known.status == "queued" for known in self.expected.values()))
    @rule(target=leases, is_idle=st.booleans())
    def claim(self, is_idle: bool):  # type: ignore[no-untyped-def]
        with service_transaction(self.worker) as session:
            job = claims.claim_job(session, POOL, worker_name="w", lease_seconds=60, is_idle=is_idle)
        claimable = [each for each in self.expected.values() if self._may_be_claimed(each, is_idle=is_idle)]
        if job is None:
            assert not claimable
            return multiple()
        known = self.expected[job.id]
        assert known in claimable
        assert known.is_suspect == any(each.is_suspect for each in claimable), "suspects come first"
        assert job.lease_token is not None
        assert all(job.lease_token > (other.token or 0) for other in self.expected.values()), "fences only grow"
        known.status, known.token, known.is_expired = "running", job.lease_token, False
        known.attempt_count += 1
        return Lease(job.id, job.tenant_id, job.lease_token)

    def _may_be_claimed(self, known: Expected, *, is_idle: bool) -> bool:
        running = [each for each in self.expected.values() if each.tenant is known.tenant and each.status == "running"]
        may_be_beside = is_idle or not known.is_suspect
        return known.status == "queued" and known.is_due and may_be_beside and len(running) < 2

    @rule(lease=leases)
    def beat(self, lease: Lease) -> None:
        told = []
        if self._try(lease, lambda session: told.append(heartbeat(session, lease, lease_seconds=60))):
            assert told == [self.expected[lease.job_id].must_pause]
            self.expected[lease.job_id].is_expired = False

    @rule(lease=leases, step=st.integers(1, 10**9))
    def report(self, lease: Lease, step: int) -> None:
        record = StepRecord(step, 1.0, 0.5, 1e-4, 1.0, 8)
        with contextlib.suppress(IntegrityError):  # a step that was reported already
            self._try(lease, lambda session: observations.record_step(session, lease, record=record, total_steps=10))

    @rule(lease=leases)
    def succeed(self, lease: Lease) -> None:
        artifact = StoredArtifact(attempt_prefix(lease.tenant_id, lease.job_id, lease.token) + "adapter/", ())
        key = f"tenants/{lease.tenant_id}/result"
        result = NewFile(new_id(), "r.csv", "fine-tune-results", key, 1, "0" * 64)

        def act(session):  # type: ignore[no-untyped-def]
            attempts.succeed_attempt(session, lease, adapter=artifact, result_file=result, trained_tokens=1)

        if self._try(lease, act):
            self._leave_running(lease, "succeeded")

    @rule(lease=leases, is_job_fault=st.booleans())
    def fail(self, lease: Lease, is_job_fault: bool) -> None:
        def act(session):  # type: ignore[no-untyped-def]
            attempts.fail_attempt(session, lease, failure=Failure(code="x", message="x"), is_job_fault=is_job_fault)

        if self._try(lease, act):
            self._retry_or_fail(lease, is_final=is_job_fault)

    @rule(lease=leases)
    def requeue(self, lease: Lease) -> None:
        if self._try(lease, lambda session: attempts.requeue_attempt(session, lease)):
            self._queue_again(lease, is_charged=False)
            self.expected[lease.job_id].is_due = True

    @rule(lease=leases)
    def postpone(self, lease: Lease) -> None:
        if self._try(
            lease, lambda session: attempts.postpone_attempt(session, lease, failure=Failure(code="x", message="x"))
        ):
            self._queue_again(lease, is_charged=False)
            self.expected[lease.job_id].is_due = False

    @rule(lease=leases)
    def suspect(self, lease: Lease) -> None:
        if self._try(
            lease, lambda session: attempts.suspect_attempt(session, lease, failure=Failure(code="x", message="x"))
        ):
            self._queue_again(lease, is_charged=False)
            self.expected[lease.job_id].is_due = self.expected[lease.job_id].is_suspect = True

    @rule(lease=leases)
    def acquit(self, lease: Lease) -> None:
        if self._try(lease, lambda session: attempts.acquit_job(session, lease)):
            self.expected[lease.job_id].is_suspect = False

    @rule(job_id=jobs)
    def pause(self, job_id: uuid.UUID) -> None:
        known = self.expected[job_id]
        with any_role_transaction(self.owner) as session, self._conflict_if(known.status in TERMINAL):
            pause_job(session, known.tenant.id, job_id=job_id)
            known.must_pause = known.status == "running"
            known.status = "paused" if known.status == "queued" else known.status

    @rule(job_id=jobs)
    def resume(self, job_id: uuid.UUID) -> None:
        known = self.expected[job_id]
        with any_role_transaction(self.owner) as session, self._conflict_if(known.status in TERMINAL):
            resume_job(session, known.tenant.id, job_id=job_id)
            known.must_pause = False
            known.status = "queued" if known.status == "paused" else known.status

    @staticmethod
    @contextlib.contextmanager
    def _conflict_if(is_expected: bool) -> Iterator[None]:
        try:
            yield
        except ConflictError:
            assert is_expected
        else:
            assert not is_expected

    @rule(lease=leases, seconds=st.floats(0, 100))
    def book(self, lease: Lease, seconds: float) -> None:
        with service_transaction(self.worker) as session:
            charges.record_usage(session, lease.token, gpu_seconds=seconds, trained_tokens=1)
        self.expected[lease.job_id].booked.setdefault(lease.token, seconds)

    @rule(job_id=jobs)
    def cancel(self, job_id: uuid.UUID) -> None:
        known = self.expected[job_id]
        try:
            with service_transaction(self.owner) as session:
                assert cancel_job(session, known.tenant.id, job_id=job_id).status == "cancelled"
        except ConflictError:
            assert known.status in ("succeeded", "failed")
        else:
            assert known.status not in ("succeeded", "failed")
            known.status, known.token, known.is_expired, known.must_pause = "cancelled", None, False, False

    @rule(job_id=jobs)
    def pass_a_lease(self, job_id: uuid.UUID) -> None:
        with service_transaction(self.owner) as session:
            past = "update jobs set lease_until = now() - interval '1 s' where id = :id and status = 'running'"
            session.execute(text(past), {"id": job_id})
        self.expected[job_id].is_expired = self.expected[job_id].status == "running"

    @precondition(lambda self: any(known.is_expired for known in self.expected.values()))
    @rule()
    def expire(self) -> None:
        with service_transaction(self.schedule) as session:
            num_expired = attempts.expire_leases(session)
        lost = [job_id for job_id, known in self.expected.items() if known.is_expired]
        assert num_expired == len(lost)
        for job_id in lost:
            known = self.expected[job_id]
            assert known.token is not None
            self._retry_or_fail(Lease(job_id, known.tenant.id, known.token), is_final=False)

    @precondition(lambda self: not all(known.is_due for known in self.expected.values()))
    @rule()
    def pass_the_retry_delays(self) -> None:
        with service_transaction(self.owner) as session:
            session.execute(text("update jobs set run_after = now() where status in ('queued', 'paused')"))
        for known in self.expected.values():
            known.is_due = True

    @rule(target=leases, lease=leases)
    def lose_the_worker_and_claim_again(self, lease: Lease):  # type: ignore[no-untyped-def]
        """The shortest way to a stale fence on a running job, which chance alone would seldom find."""
        self.pass_a_lease(lease.job_id)
        self.expire()
        self.pass_the_retry_delays()
        return self.claim(is_idle=True)

    @invariant()
    def jobs_are_as_expected(self) -> None:
        with service_transaction(self.owner) as session:
            for job_id, known in self.expected.items():
                job = session.get_one(Job, job_id)
                assert (job.status, job.attempt_count) == (known.status, known.attempt_count)
                assert job.lease_token == known.token
            booked = session.execute(text("select coalesce(sum(gpu_seconds), 0) from usage")).scalar_one()
        assert booked == pytest.approx(sum(sum(known.booked.values()) for known in self.expected.values()))

    @invariant()
    def the_contract_holds(self) -> None:
        with any_role_transaction(self.owner) as session:
            broken = [finding for finding in check_rows(session, FairnessTerms()) if finding.num_broken]
        assert broken == []

    def _try(self, lease: Lease, act) -> bool:  # type: ignore[no-untyped-def]
        """Act as the worker, and say whether it was let: exactly the newest attempt of a running job is."""
        is_held = self.expected[lease.job_id].token == lease.token
        try:
            with service_transaction(self.worker) as session:
                act(session)
        except StaleLeaseError:
            assert not is_held
            return False
        assert is_held
        return True

    def _leave_running(self, lease: Lease, status: str) -> None:
        known = self.expected[lease.job_id]
        known.status, known.token, known.is_expired, known.must_pause = status, None, False, False

    def _queue_again(self, lease: Lease, *, is_charged: bool) -> None:
        known = self.expected[lease.job_id]
        known.attempt_count -= not is_charged
        self._leave_running(lease, "paused" if known.must_pause else "queued")

    def _retry_or_fail(self, lease: Lease, *, is_final: bool) -> None:
        known = self.expected[lease.job_id]
        if is_final or known.attempt_count >= MAX_ATTEMPTS:
            self._leave_running(lease, "failed")
        else:
            self._queue_again(lease, is_charged=True)
            known.is_due = False


@pytest.mark.fault(43)
def test_any_order_of_verbs_and_stale_fences_keeps_the_contract(owner: Engine, database: Database) -> None:
    engines = {"worker": connect(database.worker_url), "schedule": connect(database.schedule_url), "owner": owner}
    tenants = (add_tenant(owner), add_tenant(owner))
    machine = type("Machine", (JobMachine,), {**engines, "tenants": tenants})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=10,
                stateful_step_count=40,
                database=None,
                phases=[Phase.generate],  # to shrink a failure would take minutes; its steps are printed as they were
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        engines["worker"].dispose()
        engines["schedule"].dispose()
