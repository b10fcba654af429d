"""Everything stored counts against the quota until its objects are gone."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, func, select, text

from core.db.models import File
from core.db.session import connect, service_transaction, tenant_transaction
from core.domain.errors import DomainError
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.leases import Lease
from core.domain.objects import attempt_prefix
from core.domain.scheduling import FairnessTerms
from core.domain.values import StoredArtifact, StoredFile
from core.services import attempts, checkpoints, claims, resume_points
from core.services.adapters import delete_adapter
from core.services.checkpoints import delete_checkpoint
from core.services.explanations import explain_job
from core.services.files import create_file, delete_file
from core.services.jobs import cancel_job
from core.services.quotas import check_storage, reserve_storage
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
from tests.databases import Database
from tests.factories.tenants import Tenant
from tests.integration.quotas.asking import NUM_AT_ONCE, act, add_file, claim, codes_at_once, limit, must_claim, submit
from tests.waiting import PATIENCE_SECONDS


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


def test_a_file_over_the_storage_quota_is_refused_until_what_was_deleted_is_gone(
    api_url: str, owner: Engine, tenant: Tenant, database: Database, servers: ServerAddresses
) -> None:
    row = b'{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}'
    headers = {"authorization": f"Bearer {tenant.api_key}"}

    def upload() -> httpx.Response:
        form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", row)}}
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
