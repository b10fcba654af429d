"""Deleted tenants are gone, except for their bill and their tombstone."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from dataclasses import dataclass

import pytest
from sqlalchemy import text

from core.db.session import operator_transaction, service_transaction
from core.domain.api_keys import ALL_SCOPES
from core.domain.duties import Duty
from core.domain.errors import ConflictError, NotFoundError
from core.domain.failures import Failure
from core.domain.leases import Lease, StaleLeaseError
from core.domain.objects import tenant_prefix
from core.services import attempts, charges, leases, observations
from core.services.api_keys import issue_api_key
from core.services.checkpoints import revoke_permission, share_checkpoint
from core.services.erasure import BEGINNING, erase_some_jobs, erase_some_of_tenant
from core.services.job_rows import BATCH_ROWS
from core.services.observations import StepRecord
from core.services.set_asides import set_aside
from core.services.tenants import TenantChange, change_tenant, create_tenant, delete_tenant, find_tenant
from tests.factories.jobs import claim
from tests.factories.tenants import Tenant
from tests.integration.erasure.worlds import TABLES, World, make_word, put, start, submit, tell, train, upload_dataset
from tests.sessions import any_role_transaction
from tests.waiting import wait_until


@dataclass(frozen=True)
class Full:
    """A tenant that has one of everything, each with its word in it, and two jobs under way."""

    tenant: Tenant
    word: str
    file_id: str
    leased: Lease


def fill_tenant(world: World) -> Full:
    word = make_word()
    with any_role_transaction(world.owner) as session:
        tenant_id = create_tenant(session, word, name=f"The {word}").id
        issued = issue_api_key(session, tenant_id, name=word, scopes=ALL_SCOPES).api_key
    tenant = Tenant(tenant_id, word, str(issued), issued.key_id)
    file_id = upload_dataset(world, tenant, word)
    for digit, is_success in ((0, True), (1, False)):
        train(world, tenant, file_id, f"{word}{digit}", is_success=is_success)
    upload_in_parts(world, tenant, word)
    lease = start(world, submit(world, tenant, file_id, f"{word}2"))
    tell(world, lease, word)
    submit(world, tenant, file_id, f"{word}3")
    with service_transaction(world.owner) as session:
        set_aside(session, Duty.CLAIM, row_id=lease.job_id, tenant_id=tenant_id, error=ValueError(word))
    return Full(tenant, word, file_id, lease)


def upload_in_parts(world: World, tenant: Tenant, word: str) -> None:
    """Leave an upload with a part in it, and a multipart upload that was begun behind the tenant's prefix."""
    with world.client(tenant) as client:
        upload = client.uploads.create(bytes=1000, filename=word, mime_type="text/plain", purpose="fine-tune")
        client.uploads.parts.create(upload.id, data=word.encode())


def delete_by_operator(world: World, slug: str) -> str:
    with operator_transaction(world.operator, actor="operator:tests") as session:
        return delete_tenant(session, slug).slug


def postpone_queued(world: World) -> None:
    with service_transaction(world.owner) as session:
        session.execute(text("update jobs set run_after = now() + interval '1 day' where status = 'queued'"))


def book(world: World, lease: Lease) -> None:
    """Let a worker that has learnt of the end of its job book what it used."""
    with service_transaction(world.worker) as session:
        charges.record_usage(session, lease.token, gpu_seconds=11, trained_tokens=0)


def test_of_a_tenant_that_an_operator_deletes_no_word_is_left_anywhere_but_its_bill_and_its_tombstone(
    world: World,
) -> None:
    doomed = fill_tenant(world)
    postpone_queued(world)
    kept = fill_tenant(world)
    share_with(world, kept, doomed)
    named = set(world.find(doomed.word))
    assert named >= {
        "tenants",
        "api_keys",
        "files",
        "uploads",
        "jobs",
        "adapters",
        "checkpoints",
        "events",
        "log_lines",
    }
    assert named >= {
        "idempotency_keys",
        "set_asides",
        "audit_entries",
        "checkpoint_permissions",
        "attempts",
        "contents",
    }
    world.run_duties()
    everywhere, seconds = world.find(kept.word), world.used_seconds()
    new_slug = delete_by_operator(world, doomed.word)
    world.erase()
    assert set(world.find(doomed.word)) <= {"keys", "contents", "resume_points"}, (
        "no row names it from the first round on"
    )
    book(world, doomed.leased)
    world.run_duties()
    assert world.find(doomed.word) == Counter()
    assert world.find(kept.word) == everywhere
    assert world.find_broken() == []
    assert rows_of(world, doomed.tenant) == {"audit_entries", "usage"}
    assert list(world.store.list_keys(tenant_prefix(doomed.tenant.id))) == []
    assert world.used_seconds() == seconds + 11
    with any_role_transaction(world.owner) as session:
        row = find_tenant(session, new_slug)
        assert (row.name, row.erased_at is None) == ("deleted", False)
        query = "select actor, subject, before, after from audit_entries where action = 'tenant.deleted'"
        assert session.execute(text(query)).all() == [("operator:tests", new_slug, {}, {})]


def test_the_keys_of_a_deleted_tenant_are_refused_and_its_worker_writes_nothing_any_more(world: World) -> None:
    doomed = fill_tenant(world)
    new_slug = delete_by_operator(world, doomed.word)
    wait_until(lambda: world.ask(doomed.tenant, "GET", "/v1/files").status_code == 401)
    world.erase()
    record = StepRecord(2, 1.0, train_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, num_tokens=10)
    with service_transaction(world.worker) as session:
        with pytest.raises(StaleLeaseError):
            leases.heartbeat(session, doomed.leased, lease_seconds=60)
        with pytest.raises(StaleLeaseError):
            observations.record_step(session, doomed.leased, record=record, total_steps=5)
        with pytest.raises(StaleLeaseError):
            attempts.fail_attempt(
                session, doomed.leased, failure=Failure(code="x", message=doomed.word), is_job_fault=True
            )
    assert claim(world.worker) is None
    with operator_transaction(world.operator, actor="operator:tests") as session:
        with pytest.raises(ConflictError, match="is deleted"):
            change_tenant(session, new_slug, change=TenantChange(is_disabled=False))
        with pytest.raises(ConflictError, match="is deleted"):
            issue_api_key(session, doomed.tenant.id, name="again")
        with pytest.raises(ConflictError, match="is deleted"):
            delete_tenant(session, new_slug)
        with pytest.raises(NotFoundError):
            delete_tenant(session, doomed.word)


def test_whoever_gets_the_slug_of_a_deleted_tenant_gets_nothing_that_was_shared_with_it(world: World) -> None:
    doomed = fill_tenant(world)
    postpone_queued(world)
    kept = fill_tenant(world)
    name = share_with(world, kept, doomed)
    delete_by_operator(world, doomed.word)
    with any_role_transaction(world.owner) as session:
        tenant_id = create_tenant(session, doomed.word).id
        issued = issue_api_key(session, tenant_id, name="x", scopes=ALL_SCOPES).api_key
    heir = Tenant(tenant_id, doomed.word, str(issued), issued.key_id)
    assert world.ask(kept.tenant, "GET", f"/v1/models/{name}").status_code == 200
    assert world.ask(heir, "GET", f"/v1/models/{name}").status_code == 404


def test_the_erasure_of_a_tenant_ends_the_same_however_often_it_is_interrupted(world: World) -> None:
    doomed = fill_tenant(world)
    add_rows(world, doomed, 2300)
    delete_by_operator(world, doomed.word)
    batches = []
    for _ in range(200):  # one transaction at a time, and each round begins anew
        with service_transaction(world.schedule) as session:
            batches.append(erase_some_of_tenant(session, doomed.tenant.id))
        with service_transaction(world.schedule) as session:
            num_rows, place = erase_some_jobs(session, after=BEGINNING)
        if not batches[-1] and not num_rows and place is None:
            break
    assert max(each.total() for each in batches) <= BATCH_ROWS + 100
    book(world, doomed.leased)
    world.run_duties()
    assert world.find(doomed.word) == Counter()
    assert rows_of(world, doomed.tenant) == {"audit_entries", "usage"}


def add_rows(world: World, full: Full, num: int) -> None:
    """Give a tenant many files that are gone, and as many entries in the audit log."""
    values = {"tenant": full.tenant.id, "num": num, "word": full.word}
    with service_transaction(world.owner) as session:
        session.execute(
            text("""
            insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status,
                deleted_at, purged_at)
            select gen_random_uuid(), :tenant, :word, 'fine-tune', 0, repeat('0', 64), 'tenants/' || :tenant || '/', 1,
                'processed', now(), now() from generate_series(1, :num)
            """),
            values,
        )


def test_a_tenant_is_said_to_be_erased_only_once_nothing_can_be_written_late(world: World) -> None:
    doomed = fill_tenant(world)
    new_slug = delete_by_operator(world, doomed.word)
    world.erase()
    book(world, doomed.leased)
    world.run_duties(min_age=dt.timedelta(days=1), num_rounds=1)
    with service_transaction(world.owner) as session:
        session.execute(text("update jobs set swept_at = now()"))
    world.run_duties(min_age=dt.timedelta(days=1))
    assert rows_of(world, doomed.tenant) == {"audit_entries", "usage"}
    late = f"{tenant_prefix(doomed.tenant.id)}files/late"
    put(world, late, doomed.word)
    with any_role_transaction(world.owner) as session:
        assert find_tenant(session, new_slug).erased_at is None
    world.run_duties()
    assert world.store.stat(late) is None
    with any_role_transaction(world.owner) as session:
        assert find_tenant(session, new_slug).erased_at is not None


def share_with(world: World, giver: Full, receiver: Full) -> str:
    """Share a checkpoint with a tenant by its slug, having taken it back once before; return the checkpoint's name."""
    query = text("select model_name from checkpoints where tenant_id = :id order by id limit 1")
    with any_role_transaction(world.owner) as session:
        name = session.scalars(query, {"id": giver.tenant.id}).one()
        (permission,) = share_checkpoint(session, giver.tenant.id, name=name, project_ids=[receiver.tenant.slug])[-1:]
        revoke_permission(session, giver.tenant.id, name=name, permission_id=permission.id)
        share_checkpoint(session, giver.tenant.id, name=name, project_ids=[receiver.tenant.slug])
        return str(name)


def rows_of(world: World, tenant: Tenant) -> set[str]:
    """Return the tables that have a row of a tenant, by the catalogue."""
    query = text(TABLES.replace("where", "join pg_attribute a on a.attrelid = c.oid and a.attname = 'tenant_id' where"))
    with service_transaction(world.owner) as session:
        holds = "select count(*) from {} where tenant_id = :id"
        tables = session.scalars(query).all()
        return {name for name in tables if session.scalar(text(holds.format(name)), {"id": tenant.id})}
