"""Quotas hold exactly, however many ask at once: what can wait waits, the rest is refused with a code."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event, func, select, text

from core.db.models import Attempt, File, Job, Usage
from core.db.session import connect, service_transaction, tenant_transaction
from core.domain.errors import DomainError, RateLimitedError
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.job_requests import JobRequest
from core.domain.jobs import pool_name
from core.domain.leases import Lease
from core.domain.objects import attempt_prefix
from core.domain.outlook import WaitCode
from core.domain.scheduling import FairnessTerms
from core.domain.values import StoredArtifact, StoredFile
from core.services import attempts, checkpoints, claims, resume_points
from core.services.adapters import delete_adapter
from core.services.checkpoints import delete_checkpoint
from core.services.explanations import explain_job
from core.services.files import create_file, delete_file
from core.services.jobs import cancel_job, pause_job, resume_job
from core.services.quotas import check_storage, reserve_storage
from core.services.submissions import submit_job
from core.services.uploads import (
    NewPart,
    NewUpload,
    add_part,
    begin_completion,
    cancel_upload,
    complete_upload,
    create_upload,
)
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from schedule.purger import purge
from tests.integration.conftest import BASE_MODEL, Database, Tenant
from tests.waiting import PATIENCE_SECONDS

POOL = pool_name(BASE_MODEL, None)
NUM_AT_ONCE = 20


@pytest.fixture
def api(database: Database) -> Iterator[Engine]:
    engine = connect(database.api_url, pool_size=NUM_AT_ONCE)
    yield engine
    engine.dispose()


@pytest.fixture
def worker(database: Database, owner: Engine) -> Iterator[Engine]:
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs cascade"))
    engine = connect(database.worker_url)
    yield engine
    engine.dispose()


def limit(owner: Engine, tenant: Tenant, **quotas: float) -> None:
    with service_transaction(owner) as session:
        for name, value in quotas.items():
            session.execute(
                text(f"update tenants set {name} = :value where id = :id"), {"value": value, "id": tenant.id}
            )


def add_file(engine: Engine, tenant: Tenant, *, size_bytes: int = 100, num_examples: int = 4) -> Any:
    file_id = new_id()
    new = NewFile(file_id, "a", "fine-tune", "k", size_bytes, "0" * 64, num_examples=num_examples)
    with tenant_transaction(engine, tenant.id) as session:
        create_file(session, tenant.id, new=new)
    return file_id


def submit(engine: Engine, tenant: Tenant, file_id: Any, **options: Any) -> Job:
    request = JobRequest(base_model_id=BASE_MODEL, training_file_id=file_id, **options)
    with tenant_transaction(engine, tenant.id) as session:
        return submit_job(session, tenant.id, request=request)


def codes_at_once(attempt: Callable[[], None]) -> list[str]:
    def run(_number: int) -> str:
        try:
            attempt()
        except DomainError as error:
            return error.code
        return "ok"

    with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        return sorted(threads.map(run, range(NUM_AT_ONCE)))


def claim(worker: Engine) -> Job | None:
    with service_transaction(worker) as session:
        return claims.claim_job(session, POOL, worker_name="w", lease_seconds=60)


def test_twenty_submits_at_once_take_the_one_place_that_is_left(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_queued=3)
    file_id = add_file(api, tenant)
    for _ in range(2):
        submit(api, tenant, file_id)
    codes = codes_at_once(lambda: submit(api, tenant, file_id))
    assert codes == ["ok", *["queue_quota_exceeded"] * (NUM_AT_ONCE - 1)][::-1] or codes.count("ok") == 1
    assert set(codes) == {"ok", "queue_quota_exceeded"}
    with tenant_transaction(api, tenant.id) as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 3


def test_twenty_uploads_at_once_never_store_more_than_the_quota(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_storage_bytes=550)

    def upload() -> None:
        new = NewFile(new_id(), "a", "fine-tune", "k", 100, "0" * 64)
        with tenant_transaction(api, tenant.id) as session:
            reserve_storage(session, tenant.id, num_bytes=100)
            create_file(session, tenant.id, new=new)

    codes = codes_at_once(upload)
    assert (codes.count("ok"), codes.count("storage_quota_exceeded")) == (5, NUM_AT_ONCE - 5)
    with tenant_transaction(api, tenant.id) as session:
        assert session.scalar(select(func.sum(File.size_bytes))) == 500


def test_many_submits_at_once_over_the_wire_are_all_answered(
    api_url: str, api: Engine, owner: Engine, tenant: Tenant
) -> None:
    """More than the threads of the API, all after one lock: whoever holds it needs no further thread to let go."""
    limit(owner, tenant, max_queued=5)
    file_id = add_file(api, tenant)
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    body = {"model": BASE_MODEL, "training_file": f"file-{file_id.hex}"}

    def post(_number: int) -> int:
        return httpx.post(
            f"{api_url}/v1/fine_tuning/jobs", headers=headers, json=body, timeout=60, trust_env=False
        ).status_code

    with ThreadPoolExecutor(60) as threads:
        statuses = list(threads.map(post, range(60)))
    assert (statuses.count(200), statuses.count(429)) == (5, 55)


def test_a_file_over_the_storage_quota_is_refused_until_what_was_deleted_is_gone(
    api_url: str, owner: Engine, tenant: Tenant, database: Database, servers: ServerAddresses
) -> None:
    row = b'{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}'
    headers = {"authorization": f"Bearer {tenant.api_key}"}

    def upload() -> httpx.Response:
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", row)}}
        return httpx.post(f"{api_url}/v1/files", headers=headers, timeout=60, trust_env=False, **form)

    limit(owner, tenant, max_storage_bytes=len(row) + 1)
    kept = upload()
    assert kept.status_code == 200
    refused = upload()
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "storage_quota_exceeded")
    httpx.delete(
        f"{api_url}/v1/files/{kept.json()['id']}", headers=headers, trust_env=False, timeout=PATIENCE_SECONDS
    ).raise_for_status()
    assert upload().json()["error"]["code"] == "storage_quota_exceeded"
    schedule, store = connect(database.schedule_url), S3ObjectStore(servers.storage)
    num_purged = purge(schedule, store, may_go_on=lambda _session: True)
    schedule.dispose()
    assert num_purged >= 1, "this file, and what other tests' tenants deleted"
    assert upload().status_code == 200


def test_a_job_that_may_train_more_tokens_than_the_quota_is_refused(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_tokens_per_job=1000)
    by_length = add_file(api, tenant, size_bytes=10**6, num_examples=2)
    submit(api, tenant, by_length, n_epochs=1)  # 2 rows of at most 256 tokens
    with pytest.raises(DomainError, match="up to 1024 tokens") as refused:
        submit(api, tenant, by_length, n_epochs=2)
    assert refused.value.code == "token_quota_exceeded"
    by_bytes = add_file(api, tenant, size_bytes=100, num_examples=4)
    submit(api, tenant, by_bytes, n_epochs=2)
    with pytest.raises(DomainError, match="up to 1068 tokens"):
        submit(api, tenant, by_bytes, n_epochs=3)


def test_a_tenant_that_has_used_its_gpu_seconds_of_the_month_waits_and_loses_nothing(
    api: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    file_id = add_file(api, tenant)
    for _ in range(2):
        submit(api, tenant, file_id)
    first = claim(worker)
    assert first is not None
    with service_transaction(owner) as session:
        attempt_id = session.scalars(select(Attempt.id).where(Attempt.job_id == first.id)).one()
        session.add(Usage(id=new_id(), tenant_id=tenant.id, attempt_id=attempt_id, gpu_seconds=100, trained_tokens=1))
    limit(owner, tenant, max_gpu_seconds_per_month=100)
    assert claim(worker) is None
    with tenant_transaction(api, tenant.id) as session:
        waiting = session.scalars(select(Job.id).where(Job.status == "queued")).one()
        told = explain_job(session, tenant.id, job_id=waiting, now=dt.datetime.now(dt.UTC), terms=FairnessTerms())
    assert told.reason is not None
    assert told.reason.code == WaitCode.QUOTA
    with service_transaction(owner) as session:
        session.execute(text("update usage set created_at = date_trunc('month', now(), 'UTC') - interval '1 second'"))
    second = claim(worker)
    assert second is not None
    assert second.tenant_id == tenant.id


def test_a_tenant_without_quotas_asks_nothing_of_them(api: Engine, tenant: Tenant) -> None:
    with tenant_transaction(api, tenant.id) as session:
        reserve_storage(session, tenant.id, num_bytes=2**60)
    submit(api, tenant, add_file(api, tenant, size_bytes=2**40, num_examples=10**6))


def test_a_refused_submit_leaves_its_place_free(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_queued=1)
    file_id = add_file(api, tenant)
    submit(api, tenant, file_id)
    with pytest.raises(RateLimitedError):
        submit(api, tenant, file_id)
    limit(owner, tenant, max_queued=2)
    submit(api, tenant, file_id)


def act(engine: Engine, tenant: Tenant, verb: Callable[..., Any], **arguments: Any) -> Any:
    """Do one verb of the tenant's in a transaction of its own."""
    with tenant_transaction(engine, tenant.id) as session:
        return verb(session, tenant.id, **arguments)


def must_claim(worker: Engine) -> Lease:
    job = claim(worker)
    assert job is not None
    assert job.lease_token is not None
    return Lease(job.id, job.tenant_id, job.lease_token)


def test_a_paused_job_keeps_its_place_in_the_queue(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_queued=2)
    file_id = add_file(api, tenant)
    jobs = [submit(api, tenant, file_id) for _ in range(2)]
    for job in jobs:
        act(api, tenant, pause_job, job_id=job.id)
    with pytest.raises(RateLimitedError, match="2 jobs wait, queued or paused, of 2 that may"):
        submit(api, tenant, file_id)
    act(api, tenant, resume_job, job_id=jobs[0].id)
    act(api, tenant, cancel_job, job_id=jobs[1].id)
    submit(api, tenant, file_id)


def test_a_running_job_is_paused_only_where_it_has_a_place_to_wait(
    api: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    limit(owner, tenant, max_queued=1)
    file_id = add_file(api, tenant)
    running = submit(api, tenant, file_id)
    lease = must_claim(worker)
    waiting = submit(api, tenant, file_id)
    with pytest.raises(RateLimitedError) as refused:
        act(api, tenant, pause_job, job_id=running.id)
    assert refused.value.code == "queue_quota_exceeded"
    act(api, tenant, cancel_job, job_id=waiting.id)
    for _ in range(2):
        act(api, tenant, pause_job, job_id=running.id)
    with pytest.raises(RateLimitedError):
        submit(api, tenant, file_id)  # the place is the pausing job's from now on
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, lease)
    with pytest.raises(RateLimitedError):
        submit(api, tenant, file_id)
    act(api, tenant, resume_job, job_id=running.id)
    must_claim(worker)
    submit(api, tenant, file_id)


def test_a_job_that_its_worker_gives_back_has_a_place_whatever_the_quota(
    api: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    limit(owner, tenant, max_queued=1)
    file_id = add_file(api, tenant)
    submit(api, tenant, file_id)
    lease = must_claim(worker)
    submit(api, tenant, file_id)
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, lease)
    with pytest.raises(RateLimitedError, match="2 jobs wait"):
        submit(api, tenant, file_id)


def store_file(api: Engine, _worker: Engine, tenant: Tenant) -> None:
    add_file(api, tenant, size_bytes=1000)


def store_deleted_file(api: Engine, _worker: Engine, tenant: Tenant) -> None:
    act(api, tenant, delete_file, file_id=add_file(api, tenant, size_bytes=1000))


def begin_upload(api: Engine, tenant: Tenant) -> Any:
    return act(api, tenant, create_upload, new=NewUpload("a", "fine-tune", "text/plain", 1000)).id


def store_upload(api: Engine, _worker: Engine, tenant: Tenant) -> None:
    begin_upload(api, tenant)


def store_cancelled_upload(api: Engine, _worker: Engine, tenant: Tenant) -> None:
    act(api, tenant, cancel_upload, upload_id=begin_upload(api, tenant))


def store_completed_upload(api: Engine, _worker: Engine, tenant: Tenant) -> None:
    upload_id = begin_upload(api, tenant)
    part = act(api, tenant, add_part, upload_id=upload_id, new=NewPart(new_id(), "k", 1000))
    completion = act(api, tenant, begin_completion, upload_id=upload_id, part_ids=[part.id])
    file = NewFile(new_id(), "a", "fine-tune", "k", 1000, "0" * 64)
    act(api, tenant, complete_upload, completion=completion, file=file)


def artifact(lease: Lease, name: str, size_bytes: int) -> StoredArtifact:
    prefix = f"{attempt_prefix(lease.tenant_id, lease.job_id, lease.token)}{name}/"
    return StoredArtifact(prefix, (StoredFile(name="a", size_bytes=size_bytes, sha256="0" * 64),))


def run_job(api: Engine, worker: Engine, tenant: Tenant) -> Lease:
    submit(api, tenant, add_file(api, tenant, size_bytes=0))
    return must_claim(worker)


def store_checkpoint(api: Engine, worker: Engine, tenant: Tenant) -> None:
    lease = run_job(api, worker, tenant)
    with service_transaction(worker) as session:
        checkpoints.record_checkpoint(session, lease, step=1, artifact=artifact(lease, "c", 1000), metrics={})


def store_deleted_checkpoint(api: Engine, worker: Engine, tenant: Tenant) -> None:
    lease = run_job(api, worker, tenant)
    with service_transaction(worker) as session:
        checkpoints.record_checkpoint(session, lease, step=1, artifact=artifact(lease, "c", 1000), metrics={})
    act(api, tenant, cancel_job, job_id=lease.job_id)
    with tenant_transaction(api, tenant.id) as session:
        name = session.scalars(text("select model_name from checkpoints")).one()
    act(api, tenant, delete_checkpoint, name=name)


def store_resume_point(api: Engine, worker: Engine, tenant: Tenant) -> None:
    lease = run_job(api, worker, tenant)
    with service_transaction(worker) as session:
        resume_points.record_resume_point(session, lease, step=1, artifact=artifact(lease, "r", 1000))


def store_adapter(api: Engine, worker: Engine, tenant: Tenant) -> None:
    lease = run_job(api, worker, tenant)
    result = NewFile(new_id(), "r", "fine-tune-results", "k", 600, "0" * 64)
    adapter = artifact(lease, "adapter", 400)
    with service_transaction(worker) as session:
        attempts.succeed_attempt(session, lease, adapter=adapter, result_file=result, trained_tokens=1)


def store_deleted_adapter(api: Engine, worker: Engine, tenant: Tenant) -> None:
    store_adapter(api, worker, tenant)
    with tenant_transaction(api, tenant.id) as session:
        name = session.scalars(text("select name from adapters")).one()
    act(api, tenant, delete_adapter, name=name)


@pytest.mark.parametrize(
    "store",
    [
        store_file,
        store_deleted_file,
        store_upload,
        store_cancelled_upload,
        store_completed_upload,
        store_checkpoint,
        store_deleted_checkpoint,
        store_resume_point,
        store_adapter,
        store_deleted_adapter,
    ],
)
def test_everything_that_is_stored_counts_until_its_objects_are_gone(
    store: Callable[[Engine, Engine, Tenant], None], api: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    store(api, worker, tenant)
    limit(owner, tenant, max_storage_bytes=1000)
    act(api, tenant, check_storage)
    with pytest.raises(DomainError, match="1000 bytes are stored, of 1000 that may be") as refused:
        act(api, tenant, check_storage, num_bytes=1)
    assert refused.value.code == "storage_quota_exceeded"


def test_no_job_is_accepted_while_more_is_stored_than_may_be(api: Engine, owner: Engine, tenant: Tenant) -> None:
    file_id = add_file(api, tenant, size_bytes=100)
    limit(owner, tenant, max_storage_bytes=99)
    with pytest.raises(DomainError, match="100 bytes are stored, of 99 that may be") as refused:
        submit(api, tenant, file_id)
    assert refused.value.code == "storage_quota_exceeded"
    limit(owner, tenant, max_storage_bytes=100)
    submit(api, tenant, file_id)


def test_a_job_waits_while_more_is_stored_than_may_be_and_says_so(
    api: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = submit(api, tenant, add_file(api, tenant, size_bytes=100))
    limit(owner, tenant, max_storage_bytes=99)
    assert claim(worker) is None
    with service_transaction(worker) as session:
        assert claims.claimable_pools(session) == []
    with tenant_transaction(api, tenant.id) as session:
        told = explain_job(session, tenant.id, job_id=job.id, now=dt.datetime.now(dt.UTC), terms=FairnessTerms())
    assert told.reason is not None
    assert told.reason.code == "storage_quota"
    assert "stores more than it may" in told.reason.sentence
    limit(owner, tenant, max_storage_bytes=100)
    assert must_claim(worker).job_id == job.id


def test_quotas_cost_a_submission_no_round_trip_and_an_upload_two(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_storage_bytes=10**6)
    file_id = add_file(api, tenant)
    submit(api, tenant, file_id)
    assert count_statements(api, lambda: submit(api, tenant, file_id)) == 3  # the means, the lock, the job
    assert count_statements(api, lambda: act(api, tenant, reserve_storage, num_bytes=1)) == 2  # the lock, the total


def count_statements(engine: Engine, do: Callable[[], Any]) -> int:
    statements: list[Any] = []

    def note(*told: Any) -> None:
        statements.append(told)

    event.listen(engine, "before_cursor_execute", note)
    do()
    event.remove(engine, "before_cursor_execute", note)
    return len(statements)
