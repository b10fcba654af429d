"""Verbs of a tenant, a worker and the schedule in any order: no request of the tenant ever passes a quota.

After each verb, waiting jobs, running jobs and stored bytes are counted anew. A tenant's verb never takes a count
beyond its quota, and is refused only if it would. What happens to the tenant may pass it: a job that returns to its
queue, and what a running job stores. No job starts for a tenant that stores too much, or runs as many jobs as it may.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine, select, text

from core.db.models import Job
from core.db.session import ServiceSession, TenantSession, connect, service_transaction, tenant_transaction
from core.domain.errors import ConflictError, DomainError
from core.domain.failures import Failure
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.job_requests import JobRequest
from core.domain.leases import Lease
from core.domain.objects import attempt_prefix, file_key
from core.domain.scheduling import FairnessTerms
from core.domain.values import StoredArtifact, StoredFile
from core.services import attempts, checkpoints, claims, resume_points, uploads
from core.services.adapters import delete_adapter
from core.services.checkpoints import delete_checkpoint
from core.services.files import create_file, delete_file
from core.services.jobs import cancel_job, pause_job, resume_job
from core.services.promises import check_rows
from core.services.purges import find_purges, mark_purged
from core.services.quotas import reserve_storage
from core.services.submissions import submit_job
from tests.databases import Database
from tests.factories.bases import BASE_MODEL, POOL
from tests.factories.tenants import Tenant, add_tenant
from tests.sessions import any_role_transaction

MAX_QUEUED, MAX_RUNNING, MAX_BYTES = 2, 2, 200
COUNTS = text("""
    select (select count(*) from jobs where tenant_id = t.id
            and (status in ('queued', 'paused') or pause_requested_at is not null)) as waiting,
        (select count(*) from jobs where tenant_id = t.id and status = 'running') as running,
        (select coalesce(sum(size_bytes), 0)::bigint from (
            select size_bytes from files where tenant_id = t.id and purged_at is null
            union all select size_bytes from uploads
                where tenant_id = t.id and purged_at is null and status <> 'completed'
            union all select size_bytes from adapters where tenant_id = t.id and purged_at is null
            union all select size_bytes from checkpoints where tenant_id = t.id and purged_at is null
            union all select size_bytes from resume_points where tenant_id = t.id) stored) as stored,
        coalesce((select num_bytes from storage_totals where tenant_id = t.id), 0) as counted,
        exists (select from jobs where tenant_id = t.id and status = 'queued' and run_after <= now()) as is_claimable
    from tenants t where t.id = :id
""")
# What is named twice is done twice as often.
VERBS = (
    *("submit", "submit", "submit", "claim", "claim", "claim", "pause", "pause", "resume", "cancel"),
    *("store_checkpoint", "store_resume_point", "go_on_from", "give_back", "fail", "succeed", "lose_the_worker"),
    *("upload", "begin_upload", "complete_upload", "cancel_upload"),
    *("delete_file", "delete_adapter", "delete_checkpoint", "pass_an_hour", "purge"),
)

PARTS_OF_PENDING_UPLOADS = (
    "select upload_parts.id, upload_id, upload_parts.size_bytes from upload_parts"
    " join uploads on uploads.id = upload_id and status = 'pending'"
)


@dataclass(frozen=True)
class Drawn:
    """Which tenant, which of what it has, and how large."""

    who: int
    pick: int
    size: int


# One tenant comes to its quotas sooner than two.
DRAWN = st.builds(Drawn, st.sampled_from((0, 0, 0, 1)), st.integers(0, 99), st.integers(1, 120))


@dataclass(frozen=True)
class Counts:
    """What there is of one tenant. `counted` is what the triggers say is stored."""

    waiting: int
    running: int
    stored: int
    counted: int
    is_claimable: bool

    @property
    def may_start(self) -> bool:
        return self.is_claimable and self.running < MAX_RUNNING and self.stored <= MAX_BYTES


class QuotaMachine(RuleBasedStateMachine):
    """Two tenants beside each other. A number that is drawn picks one of what there is; nothing happens without any.

    Verbs are drawn several at a time: drawn one by one they would seldom come to a quota.
    """

    owner: Engine
    api: Engine
    worker: Engine
    schedule: Engine
    tenants: tuple[Tenant, Tenant]

    def __init__(self) -> None:
        super().__init__()
        with service_transaction(self.owner) as session:
            session.execute(text("truncate jobs, queues, files, uploads, storage_totals cascade"))
            for tenant in self.tenants:
                create_file(session, tenant.id, new=self._new_file(tenant.id, 10))

    @rule(acts=st.lists(st.tuples(st.sampled_from(VERBS), DRAWN), min_size=6, max_size=10))
    def act(self, acts: list[tuple[str, Drawn]]) -> None:
        for verb, drawn in acts:
            getattr(self, verb)(drawn)
            self.what_is_counted_is_what_there_is()

    # The tenant's own verbs.

    def upload(self, drawn: Drawn) -> None:
        def act(session: TenantSession, tenant_id: uuid.UUID) -> None:
            reserve_storage(session, tenant_id, num_bytes=drawn.size)
            create_file(session, tenant_id, new=self._new_file(tenant_id, drawn.size))

        self._ask(
            drawn.who, act, refused={"storage_quota_exceeded": lambda counts: counts.stored + drawn.size > MAX_BYTES}
        )

    def begin_upload(self, drawn: Drawn) -> None:
        def act(session: TenantSession, tenant_id: uuid.UUID) -> None:
            reserve_storage(session, tenant_id, num_bytes=drawn.size)
            new = uploads.NewUpload("a", "fine-tune", "text/plain", drawn.size)
            upload = uploads.create_upload(session, tenant_id, new=new)
            part = uploads.NewPart(new_id(), "k", drawn.size)
            uploads.add_part(session, tenant_id, upload_id=upload.id, new=part)

        self._ask(
            drawn.who, act, refused={"storage_quota_exceeded": lambda counts: counts.stored + drawn.size > MAX_BYTES}
        )

    def complete_upload(self, drawn: Drawn) -> None:
        for part in self._pick(drawn, PARTS_OF_PENDING_UPLOADS):
            completion = self._ask(
                drawn.who,
                uploads.begin_completion,
                may_conflict=True,
                upload_id=part.upload_id,
                part_ids=[part.id],
            )
            if completion is None:  # the upload has expired
                continue
            if drawn.size % 4:
                new = self._new_file(self.tenants[drawn.who].id, part.size_bytes)
                self._ask(drawn.who, uploads.complete_upload, completion=completion, file=new)
            else:
                self._ask(drawn.who, uploads.abandon_completion, completion=completion)

    def cancel_upload(self, drawn: Drawn) -> None:
        for upload in self._pick(drawn, "select id from uploads where status = 'pending'"):
            self._ask(drawn.who, uploads.cancel_upload, may_conflict=True, upload_id=upload.id)

    def delete_file(self, drawn: Drawn) -> None:
        for file in self._pick(drawn, "select id from files where deleted_at is null"):
            self._ask(drawn.who, delete_file, may_conflict=True, file_id=file.id)

    def delete_adapter(self, drawn: Drawn) -> None:
        for adapter in self._pick(drawn, "select name, id from adapters where deleted_at is null"):
            self._ask(drawn.who, delete_adapter, name=adapter.name)

    def delete_checkpoint(self, drawn: Drawn) -> None:
        for checkpoint in self._pick(drawn, "select model_name, id from checkpoints where deleted_at is null"):
            self._ask(drawn.who, delete_checkpoint, may_conflict=True, name=checkpoint.model_name)

    def submit(self, drawn: Drawn) -> None:
        query = "select id from files where deleted_at is null and purpose = 'fine-tune'"
        for file in self._pick(drawn, query):
            request = JobRequest(base_model_id=BASE_MODEL, training_file_id=file.id)
            refused = {
                "storage_quota_exceeded": lambda counts: counts.stored > MAX_BYTES,
                "queue_quota_exceeded": lambda counts: counts.waiting >= MAX_QUEUED,
            }
            self._ask(drawn.who, submit_job, refused=refused, request=request)

    def pause(self, drawn: Drawn) -> None:
        takes_place = "status = 'running' and pause_requested_at is null as takes_place"
        for job in self._pick(drawn, f"select id, {takes_place} from jobs where finished_at is null"):
            full = {"queue_quota_exceeded": lambda counts: counts.waiting >= MAX_QUEUED} if job.takes_place else {}
            self._ask(drawn.who, pause_job, refused=full, may_conflict=True, job_id=job.id)

    def resume(self, drawn: Drawn) -> None:
        waits = "status = 'paused' or pause_requested_at is not null"
        for job in self._pick(drawn, f"select id from jobs where {waits}"):
            self._ask(drawn.who, resume_job, may_conflict=True, job_id=job.id)

    def cancel(self, drawn: Drawn) -> None:
        for job in self._pick(drawn, "select id from jobs"):
            self._ask(drawn.who, cancel_job, may_conflict=True, job_id=job.id)

    # What happens to it.

    def claim(self, _drawn: Drawn) -> None:
        before = {tenant.id: self._count(tenant) for tenant in self.tenants}
        with service_transaction(self.worker) as session:
            job = claims.claim_job(session, POOL, worker_name="w", lease_seconds=60)
        may_start = {tenant_id for tenant_id, counts in before.items() if counts.may_start}
        assert job.tenant_id in may_start if job is not None else not may_start

    def give_back(self, drawn: Drawn) -> None:
        for lease in self._leases(drawn):
            self._work(attempts.requeue_attempt, lease)

    def fail(self, drawn: Drawn) -> None:
        for lease in self._leases(drawn):
            self._work(
                attempts.fail_attempt, lease, failure=Failure(code="x", message="x"), is_job_fault=drawn.size % 4 == 0
            )

    def store_checkpoint(self, drawn: Drawn) -> None:
        for lease in self._leases(drawn):
            step = drawn.pick % 3 + 1
            artifact = self._artifact(lease, f"c{step}", drawn.size)
            self._work(checkpoints.record_checkpoint, lease, step=step, artifact=artifact, metrics={})

    def store_resume_point(self, drawn: Drawn) -> None:
        for lease in self._leases(drawn):
            step = drawn.pick % 5 + 1
            artifact = self._artifact(lease, f"r{step}", drawn.size)
            self._work(resume_points.record_resume_point, lease, step=step, artifact=artifact)

    def go_on_from(self, drawn: Drawn) -> None:
        for lease in self._leases(drawn):
            self._work(resume_points.begin_steps, lease, step=drawn.pick % 5, total_steps=5)

    def succeed(self, drawn: Drawn) -> None:
        def act(session: ServiceSession, lease: Lease) -> None:
            result = self._new_file(lease.tenant_id, 10, purpose="fine-tune-results")
            adapter = self._artifact(lease, "adapter", drawn.size)
            attempts.succeed_attempt(session, lease, adapter=adapter, result_file=result, trained_tokens=1)
            resume_points.forget_resume_points(session, lease)

        for lease in self._leases(drawn):
            self._work(act, lease)

    def lose_the_worker(self, drawn: Drawn) -> None:
        for lease in self._leases(drawn):
            with service_transaction(self.owner) as session:
                past = text("update jobs set lease_until = now() - interval '1 s' where id = :id")
                session.execute(past, {"id": lease.job_id})
            with service_transaction(self.schedule) as session:
                assert attempts.expire_leases(session) == 1

    def pass_an_hour(self, _drawn: Drawn) -> None:
        with service_transaction(self.owner) as session:
            session.execute(text("update uploads set expires_at = expires_at - interval '1 hour'"))
            session.execute(text("update jobs set run_after = now() where status in ('queued', 'paused')"))

    def purge(self, _drawn: Drawn) -> None:
        with service_transaction(self.schedule) as session:
            while due := find_purges(session):
                for each in due:
                    mark_purged(session, each)

    def what_is_counted_is_what_there_is(self) -> None:
        for tenant in self.tenants:
            counts = self._count(tenant)
            assert counts.stored == counts.counted
            assert counts.running <= MAX_RUNNING

    @invariant()
    def the_queues_count_what_waits(self) -> None:
        with any_role_transaction(self.owner) as session:
            assert [
                finding
                for finding in check_rows(session, FairnessTerms())
                if finding.num_broken and finding.promise == "I1"
            ] == []

    def _ask(
        self,
        who: int,
        verb: Callable[..., Any],
        *,
        refused: dict[str, Callable[[Counts], bool]] | None = None,
        may_conflict: bool = False,
        **arguments: Any,
    ) -> Any:
        """Do a verb of the tenant's. `refused` says by code when it must be refused; else it must not be.

        Return what the verb returns, or None where it was refused.
        """
        before = self._count(self.tenants[who])
        code = done = None
        try:
            with tenant_transaction(self.api, self.tenants[who].id) as session:
                done = verb(session, self.tenants[who].id, **arguments)
        except ConflictError:
            assert may_conflict
        except DomainError as error:
            code = error.code
        due = {name for name, is_due in (refused or {}).items() if is_due(before)}
        assert code in due if due else code is None, (code, due)
        after = self._count(self.tenants[who])
        assert after.waiting <= max(before.waiting, MAX_QUEUED)
        assert after.stored <= max(before.stored, MAX_BYTES)
        return done

    def _work(self, verb: Callable[..., Any], lease: Lease, **arguments: Any) -> None:
        with service_transaction(self.worker) as session:
            verb(session, lease, **arguments)

    def _count(self, tenant: Tenant) -> Counts:
        with service_transaction(self.owner) as session:
            return Counts(*session.execute(COUNTS, {"id": tenant.id}).one())

    def _pick(self, drawn: Drawn, query: str) -> list[Any]:
        """Return one of the tenant's rows that a query finds, or none."""
        with tenant_transaction(self.api, self.tenants[drawn.who].id) as session:
            rows = session.execute(text(f"{query} order by 1")).all()
        return [rows[drawn.pick % len(rows)]] if rows else []

    def _leases(self, drawn: Drawn) -> list[Lease]:
        with service_transaction(self.owner) as session:
            running = select(Job).where(Job.tenant_id == self.tenants[drawn.who].id, Job.status == "running")
            rows = session.scalars(running.order_by(Job.id)).all()
        leases = [Lease(row.id, row.tenant_id, row.lease_token) for row in rows if row.lease_token is not None]
        return [leases[drawn.pick % len(leases)]] if leases else []

    @staticmethod
    def _new_file(tenant_id: uuid.UUID, size: int, *, purpose: Any = "fine-tune") -> NewFile:
        file_id = new_id()
        return NewFile(file_id, "a", purpose, file_key(tenant_id, file_id), size, "0" * 64, num_examples=4)

    @staticmethod
    def _artifact(lease: Lease, name: str, size: int) -> StoredArtifact:
        prefix = f"{attempt_prefix(lease.tenant_id, lease.job_id, lease.token)}{name}/"
        return StoredArtifact(prefix, (StoredFile(name="a", size_bytes=size, sha256="0" * 64),))


def test_no_order_of_verbs_passes_a_quota(owner: Engine, database: Database) -> None:
    engines = {
        "owner": owner,
        "api": connect(database.api_url),
        "worker": connect(database.worker_url),
        "schedule": connect(database.schedule_url),
    }
    tenants = (add_tenant(owner), add_tenant(owner))
    with service_transaction(owner) as session:
        quotas = {"queued": MAX_QUEUED, "running": MAX_RUNNING, "bytes": MAX_BYTES}
        session.execute(
            text("update tenants set max_queued = :queued, max_running = :running, max_storage_bytes = :bytes"), quotas
        )
    machine = type("Machine", (QuotaMachine,), {**engines, "tenants": tenants})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=10,
                stateful_step_count=12,
                deadline=None,
                database=None,
                phases=[Phase.generate],  # to shrink a failure would take minutes; its steps are printed as they were
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        for name in ("api", "worker", "schedule"):
            engines[name].dispose()
