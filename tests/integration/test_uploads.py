"""Completion of an upload is a state with a holder. After too long another holder may take it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from core.db.session import service_transaction, tenant_transaction
from core.domain.errors import BusyError, PermissionDeniedError
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.services import quotas, uploads
from core.services.purges import find_purges
from core.services.uploads import Completion, NewPart, NewUpload
from tests.databases import Database, opened
from tests.factories.tenants import Tenant

SIZE = 10


@pytest.fixture
def schedule(database: Database) -> Iterator[Engine]:
    with opened(database.schedule_url) as engine:
        yield engine


@pytest.fixture
def part(api: Engine, tenant: Tenant) -> tuple[uuid.UUID, uuid.UUID]:
    """The ids of an upload and of its only part."""
    with tenant_transaction(api, tenant.id) as session:
        upload_id = uploads.create_upload(session, tenant.id, new=NewUpload("a", "fine-tune", "text/jsonl", SIZE)).id
        new = NewPart(new_id(), "tenants/x", SIZE)
        return upload_id, uploads.add_part(session, tenant.id, upload_id=upload_id, new=new).id


def begin(api: Engine, tenant: Tenant, part: tuple[uuid.UUID, uuid.UUID]) -> Completion:
    with tenant_transaction(api, tenant.id) as session:
        return uploads.begin_completion(session, tenant.id, upload_id=part[0], part_ids=[part[1]])


def complete(api: Engine, tenant: Tenant, completion: Completion) -> str:
    file = NewFile(new_id(), "a", "fine-tune", "k", SIZE, "0" * 64)
    with tenant_transaction(api, tenant.id) as session:
        return str(uploads.complete_upload(session, tenant.id, completion, file=file).status)


def let_time_pass(owner: Engine, tenant: Tenant, column: str) -> None:
    with tenant_transaction(owner, tenant.id) as session:
        session.execute(
            text(f"update uploads set {column} = now() - interval '1 second' where tenant_id = :id"), {"id": tenant.id}
        )


def test_a_stale_completion_cannot_end_the_upload_of_a_newer_one(
    api: Engine, owner: Engine, tenant: Tenant, part: tuple[uuid.UUID, uuid.UUID]
) -> None:
    stale = begin(api, tenant, part)
    with pytest.raises(BusyError):
        begin(api, tenant, part)
    let_time_pass(owner, tenant, "completing_until")
    newer = begin(api, tenant, part)
    with tenant_transaction(api, tenant.id) as session:
        uploads.abandon_completion(session, tenant.id, stale)
    with pytest.raises(BusyError):
        complete(api, tenant, stale)
    with pytest.raises(BusyError), tenant_transaction(api, tenant.id) as session:
        uploads.extend_completion(session, tenant.id, stale)
    assert complete(api, tenant, newer) == "completed"
    with tenant_transaction(api, tenant.id) as session:
        assert session.scalar(text("select count(*) from files")) == 1


def test_a_completion_that_says_so_holds_on(api: Engine, tenant: Tenant, part: tuple[uuid.UUID, uuid.UUID]) -> None:
    begun = begin(api, tenant, part)
    with tenant_transaction(api, tenant.id) as session:
        extended = uploads.extend_completion(session, tenant.id, begun)
    assert extended.until > begun.until
    assert complete(api, tenant, extended) == "completed"


def test_an_upload_does_not_expire_while_it_is_completed_and_counts_as_stored(
    api: Engine, owner: Engine, schedule: Engine, tenant: Tenant, part: tuple[uuid.UUID, uuid.UUID]
) -> None:
    with tenant_transaction(owner, tenant.id) as session:
        session.execute(
            text("update uploads set expires_at = now() + interval '1 second' where tenant_id = :id"), {"id": tenant.id}
        )
    begin(api, tenant, part)
    with tenant_transaction(owner, tenant.id) as session:
        left = text("select expires_at - now() > interval '1 minute' from uploads where tenant_id = :id")
        assert session.scalar(left, {"id": tenant.id})
    with service_transaction(schedule) as session:
        assert str(part[0]) not in " ".join(purge.location for purge in find_purges(session))
    with tenant_transaction(owner, tenant.id) as session:
        session.execute(
            text("update tenants set max_storage_bytes = :size where id = :id"), {"size": SIZE, "id": tenant.id}
        )
    with pytest.raises(PermissionDeniedError), tenant_transaction(api, tenant.id) as session:
        quotas.check_storage(session, tenant.id, num_bytes=1)
    let_time_pass(owner, tenant, "expires_at")
    with service_transaction(schedule) as session:
        assert str(part[0]) in " ".join(purge.location for purge in find_purges(session))
