"""Objects of deleted rows are deleted, tenant by tenant, until nothing is due, even if one row or object fails."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import Engine, func, select, text

from core.db.models import File
from core.db.session import service_transaction, tenant_transaction
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.objects import attempt_prefix, file_key
from core.domain.values import StoredArtifact, StoredFile
from core.services import checkpoints, resume_points
from core.services.files import create_file
from core.services.jobs import cancel_job
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.jobs import claim, queue_job
from tests.factories.tenants import Tenant, add_tenant
from tests.processes import schedule_process
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _alone(owner: Engine) -> None:
    with service_transaction(owner) as session:
        session.execute(text("truncate tenants, leaders cascade"))


def add_deleted_files(owner: Engine, tenant: Tenant, num_files: int) -> None:
    with service_transaction(owner) as session:
        for _ in range(num_files):
            file_id = new_id()
            new = NewFile(file_id, "a", "fine-tune", file_key(tenant.id, file_id), 1, "0" * 64)
            create_file(session, tenant.id, new=new).deleted_at = func.now()


def num_unpurged(owner: Engine, tenant: Tenant) -> int:
    with service_transaction(owner) as session:
        unpurged = select(func.count()).where(File.tenant_id == tenant.id, File.purged_at.is_(None))
        return session.scalars(unpurged).one()


def test_all_that_is_due_goes_in_one_go_and_nobody_waits_for_the_tenant_that_deleted_most(
    owner: Engine, database: Database, servers: ServerAddresses
) -> None:
    whale, small = add_tenant(owner), add_tenant(owner)
    add_deleted_files(owner, whale, 250)
    add_deleted_files(owner, small, 3)
    with schedule_process(database, servers, clean_interval_seconds="3600"):
        wait_until(lambda: num_unpurged(owner, small) == 0)
        wait_until(lambda: num_unpurged(owner, whale) == 0)
    with service_transaction(owner) as session:
        last = session.scalar(select(func.max(File.purged_at)).where(File.tenant_id == small.id))
        sooner = select(func.count()).where(File.tenant_id == whale.id, File.purged_at < last)
        assert session.scalars(sooner).one() <= 50


def plant_model(owner: Engine, store: S3ObjectStore, tenant: Tenant) -> str:
    """Add a deleted checkpoint with an object, and return the object's key."""
    queue_job(owner, tenant)
    lease = claim(owner)
    assert lease is not None
    prefix = attempt_prefix(lease.tenant_id, lease.job_id, lease.token) + "checkpoints/step-1/"
    store.put_bytes(prefix + "a", b"a", content_type="text/plain")
    file = StoredFile(name="a", size_bytes=1, sha256="0" * 64)
    with service_transaction(owner) as session:
        checkpoints.record_checkpoint(session, lease, step=1, artifact=StoredArtifact(prefix, (file,)), metrics={})
        session.execute(text("update checkpoints set deleted_at = now() where job_id = :id"), {"id": lease.job_id})
    return prefix + "a"


@pytest.mark.parametrize("nonsense", ["", "/", "tenants/", "tenants/{tenant}/", "tenants/{other}/", "../x/", "bases/"])
def test_a_row_that_names_no_object_of_its_tenant_deletes_nothing_and_holds_up_nobody(
    nonsense: str, owner: Engine, database: Database, servers: ServerAddresses, store: S3ObjectStore
) -> None:
    tenant, other = add_tenant(owner), add_tenant(owner)
    keys = [file_key(each.id, new_id()) for each in (tenant, other)]
    for key in keys:
        store.put_bytes(key, b"kept", content_type="text/plain")
    poisonous = plant_model(owner, store, tenant)
    gone = plant_model(owner, store, other)
    add_deleted_files(owner, tenant, 1)
    with service_transaction(owner) as session:
        prefix = nonsense.format(tenant=tenant.id, other=other.id)
        own = {"prefix": prefix, "id": tenant.id}
        session.execute(text("update checkpoints set object_prefix = :prefix where tenant_id = :id"), own)
    with schedule_process(database, servers, clean_interval_seconds="3600"):
        wait_until(lambda: store.stat(gone) is None)
        wait_until(lambda: num_unpurged(owner, tenant) == 1)  # the job's dataset, which is not deleted
        wait_until(lambda: is_set_aside(owner, tenant))
    assert [store.stat(key) for key in [*keys, poisonous]] == [4, 4, 1]


def is_set_aside(owner: Engine, tenant: Tenant) -> bool:
    query = text("select count(*) from set_asides where tenant_id = :id and duty = 'purge' and reason <> ''")
    with service_transaction(owner) as session:
        return bool(session.scalar(query, {"id": tenant.id}) == 1)


def test_what_a_job_could_resume_from_goes_when_the_job_is_over_and_counts_no_longer(
    owner: Engine, database: Database, servers: ServerAddresses, store: S3ObjectStore
) -> None:
    tenant = add_tenant(owner)
    job = queue_job(owner, tenant)
    lease = claim(owner)
    assert lease is not None
    prefix = attempt_prefix(lease.tenant_id, lease.job_id, lease.token) + "resume/1/"
    store.put_bytes(prefix + "a", b"state", content_type="text/plain")
    file = StoredFile(name="a", size_bytes=5, sha256="0" * 64)
    with service_transaction(owner) as session:
        resume_points.record_resume_point(session, lease, step=1, artifact=StoredArtifact(prefix, (file,)))
    with schedule_process(database, servers, clean_interval_seconds="0.1"):
        wait_until(lambda: store.stat(prefix + "a") == 5)
        with tenant_transaction(owner, tenant.id) as session:
            cancel_job(session, tenant.id, job_id=job.id)
        wait_until(lambda: store.stat(prefix + "a") is None)
        wait_until(lambda: stored_bytes(owner, tenant.id) == 1)  # the dataset


def stored_bytes(owner: Engine, tenant_id: uuid.UUID) -> int:
    with service_transaction(owner) as session:
        query = text("select num_bytes from storage_totals where tenant_id = :id")
        return int(session.scalars(query, {"id": tenant_id}).one())


def test_a_duty_that_dies_of_our_fault_ends_the_process_to_be_started_again(
    owner: Engine, database: Database, servers: ServerAddresses
) -> None:
    """A schedule that no longer purges, and still leads, would be worse than none."""
    with service_transaction(owner) as session:
        session.execute(text("revoke delete on idempotency_keys from espalier_schedule"))
    try:
        with schedule_process(database, servers, clean_interval_seconds="0.1") as process:
            wait_until(lambda: process.poll() is not None)
            assert process.returncode == 1
    finally:
        with service_transaction(owner) as session:
            session.execute(text("grant delete on idempotency_keys to espalier_schedule"))
