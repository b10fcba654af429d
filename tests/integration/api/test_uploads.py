"""Uploads in parts, and files that expire."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from api.intake import HeldUpload
from core.db.models import File
from core.db.session import connect, service_transaction, tenant_transaction
from core.domain.api_keys import Identity
from core.domain.ids import IdKind, parse_id
from core.services.files import expire_files
from core.services.purges import find_purges
from core.services.uploads import begin_completion
from core.storage import S3ObjectStore
from tests.databases import Database, opened
from tests.factories.files import GOOD, upload
from tests.factories.jobs import submit
from tests.factories.tenants import Tenant
from tests.waiting import PATIENCE_SECONDS

ROWS = b"\n".join([GOOD] * 400)
HARDLY = 0.01  # seconds, of an engine that is to give up


def begin(client: OpenAI, size: int, **options: Any) -> Any:
    return client.uploads.create(
        bytes=size, filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune", **options
    )


@pytest.fixture
def schedule(database: Database) -> Iterator[Engine]:
    with opened(database.schedule_url) as engine:
        yield engine


def test_parts_in_any_order_become_one_checked_file(client: OpenAI) -> None:
    begun = begin(client, len(ROWS))
    assert (begun.status, begun.bytes, begun.file) == ("pending", len(ROWS), None)
    cut = 10_001  # in the middle of a row
    second = client.uploads.parts.create(begun.id, data=ROWS[cut:])
    first = client.uploads.parts.create(begun.id, data=ROWS[:cut])
    assert first.upload_id == begun.id
    done = client.uploads.complete(begun.id, part_ids=[first.id, second.id], md5=hashlib.md5(ROWS).hexdigest())
    assert done.file is not None
    assert (done.status, done.file.status, done.file.filename) == ("completed", "processed", "rows.jsonl")
    assert done.file.model_extra is not None
    assert done.file.model_extra["num_examples"] == 400
    assert client.files.content(done.file.id).read() == ROWS
    assert submit(client, done.file.id).status == "queued"
    again = client.uploads.complete(begun.id, part_ids=[first.id, second.id])
    assert again.file is not None
    assert again.file.id == done.file.id


def test_the_clients_own_chunked_upload_works(client: OpenAI) -> None:
    done = client.uploads.upload_file_chunked(
        file=ROWS, filename="rows.jsonl", bytes=len(ROWS), mime_type="text/jsonl", purpose="fine-tune", part_size=7000
    )
    assert done.file is not None
    assert client.files.content(done.file.id).read() == ROWS


def test_a_completed_upload_with_bad_rows_is_a_file_in_error(client: OpenAI) -> None:
    begun = begin(client, 8)
    part = client.uploads.parts.create(begun.id, data=b"not json")
    done = client.uploads.complete(begun.id, part_ids=[part.id])
    assert done.file is not None
    assert done.file.status_details is not None
    assert (done.file.status, done.file.status_details[:6]) == ("error", "Line 1")


@pytest.mark.parametrize(
    ("complete", "code"),
    [
        ({"part_ids": ["part_" + "0" * 32]}, "invalid_request"),
        ({"part_ids": ["nonsense"]}, "not_found"),
        ({"part_ids": [0, 0]}, "invalid_request"),
        ({"part_ids": [0]}, "upload_size_mismatch"),
        ({"part_ids": [0, 1], "md5": "0" * 32}, "checksum_mismatch"),
        ({"part_ids": [0, 1], "md5": "zz"}, "invalid_request"),
        ({"part_ids": []}, "invalid_request"),
    ],
)
def test_what_does_not_add_up_is_not_completed(
    client: OpenAI, store: S3ObjectStore, tenant: Tenant, complete: dict[str, Any], code: str
) -> None:
    begun = begin(client, len(GOOD))
    parts = [client.uploads.parts.create(begun.id, data=data).id for data in (GOOD[:9], GOOD[9:])]
    part_ids = [parts[part] if isinstance(part, int) else part for part in complete["part_ids"]]
    with pytest.raises(openai.BadRequestError) as refused:
        client.uploads.complete(begun.id, **{**complete, "part_ids": part_ids})
    assert refused.value.code in {code, "invalid_request"}
    assert client.files.list().data == []
    assert not list(store.list_keys(f"tenants/{tenant.id}/files/"))
    assert client.uploads.complete(begun.id, part_ids=parts).status == "completed"


def test_more_than_was_promised_is_refused_and_not_kept(client: OpenAI, store: S3ObjectStore, tenant: Tenant) -> None:
    begun = begin(client, 4)
    client.uploads.parts.create(begun.id, data=b"123")
    with pytest.raises(openai.APIStatusError) as refused:
        client.uploads.parts.create(begun.id, data=b"45")
    assert refused.value.status_code == 413
    assert len(list(store.list_keys(f"tenants/{tenant.id}/uploads/"))) == 1


def test_a_part_over_64_mib_is_refused(client: OpenAI) -> None:
    begun = begin(client, 2**30)
    with pytest.raises(openai.APIStatusError) as refused:
        client.uploads.parts.create(begun.id, data=bytes(2**26 + 1))
    assert refused.value.status_code == 413


def test_a_cancelled_or_expired_upload_takes_nothing_more_and_its_parts_go(
    client: OpenAI, owner: Engine, tenant: Tenant, store: S3ObjectStore, schedule: Engine
) -> None:
    cancelled, expired = begin(client, 8), begin(client, 8)
    parts = {each.id: client.uploads.parts.create(each.id, data=b"12345678").id for each in (cancelled, expired)}
    assert client.uploads.cancel(cancelled.id).status == "cancelled"
    with tenant_transaction(owner, tenant.id) as session:
        session.execute(
            text("update uploads set expires_at = now() where id = :id"), {"id": parse_id(IdKind.UPLOAD, expired.id)}
        )
    for each in (cancelled, expired):
        for ask in (
            lambda each=each: client.uploads.parts.create(each.id, data=b"1"),
            lambda each=each: client.uploads.complete(each.id, part_ids=[parts[each.id]]),
            lambda each=each: client.uploads.cancel(each.id),
        ):
            with pytest.raises(openai.ConflictError) as refused:
                ask()
            assert refused.value.code == "upload_not_pending"
    with service_transaction(schedule) as session:
        due = [purge.location for purge in find_purges(session)]
    prefix = f"tenants/{tenant.id}/uploads/"
    assert len([location for location in due if location.startswith(prefix)]) == 2
    assert sum(store.delete_prefix(location) for location in due if location.startswith(prefix)) == 2


def test_another_tenants_upload_is_not_found(client: OpenAI, other_client: OpenAI) -> None:
    begun = begin(client, len(GOOD))
    part = client.uploads.parts.create(begun.id, data=GOOD)
    for ask in (
        lambda: other_client.uploads.parts.create(begun.id, data=b"1"),
        lambda: other_client.uploads.complete(begun.id, part_ids=[part.id]),
        lambda: other_client.uploads.cancel(begun.id),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    own = begin(other_client, len(GOOD))
    with pytest.raises(openai.BadRequestError):
        other_client.uploads.complete(own.id, part_ids=[part.id])


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"bytes": 0}, "bytes"),
        ({"bytes": 8 * 2**30 + 1}, "bytes"),
        ({"purpose": "vision"}, "purpose"),
        ({"filename": ""}, "filename"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after.seconds"),
    ],
)
def test_a_bad_upload_is_refused_by_the_field_at_fault(client: OpenAI, options: dict[str, Any], param: str) -> None:
    good = {"bytes": 1, "filename": "rows.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.uploads.create(**{**good, **options})
    assert refused.value.param == param


def test_a_file_says_when_it_expires(client: OpenAI) -> None:
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("a.jsonl", GOOD), purpose="fine-tune", expires_after=expiry)
    assert file.expires_at == file.created_at + 3600
    assert abs(file.created_at - time.time()) < 60
    begun = begin(client, len(GOOD), expires_after=expiry)
    part = client.uploads.parts.create(begun.id, data=GOOD)
    done = client.uploads.complete(begun.id, part_ids=[part.id])
    assert done.file is not None
    assert done.file.expires_at == done.file.created_at + 3600
    assert upload(client, GOOD).expires_at is None


@pytest.mark.parametrize(
    ("anchor", "seconds"),
    [
        ("created_at", 3599),
        ("created_at", 2_592_001),
        ("last_active_at", 3600),
        ("created_at", "9" * 400),
        ("created_at", "½"),
    ],
)
def test_a_wrong_expiry_is_refused(client: OpenAI, anchor: Any, seconds: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(
            file=("a.jsonl", GOOD), purpose="fine-tune", expires_after={"anchor": anchor, "seconds": seconds}
        )
    assert str(refused.value.param).startswith("expires_after")
    assert client.files.list().data == []


def test_an_expired_file_goes_when_no_job_needs_it_any_more(
    client: OpenAI, owner: Engine, tenant: Tenant, schedule: Engine
) -> None:
    idle, used, kept = (upload(client, GOOD) for _ in range(3))
    job = submit(client, used.id)
    with tenant_transaction(owner, tenant.id) as session:
        for file in (idle, used):
            session.get_one(File, parse_id(IdKind.FILE, file.id)).expires_at = session.scalar(text("select now()"))

    def left() -> set[str]:
        with service_transaction(schedule) as session:
            expire_files(session)
        return {file.id for file in client.files.list()}

    assert left() == {used.id, kept.id}
    client.fine_tuning.jobs.cancel(job.id)
    assert left() == {kept.id}


def test_files_are_filtered_by_their_purpose(client: OpenAI) -> None:
    file = upload(client, GOOD)
    assert [each.id for each in client.files.list(purpose="fine-tune")] == [file.id]
    assert client.files.list(purpose="fine-tune-results").data == []
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.jsonl", GOOD), purpose="assistants")
    assert refused.value.param == "purpose"


def test_a_part_that_is_no_form_is_refused(client: OpenAI, api_url: str, tenant: Tenant) -> None:
    url = f"{api_url}/v1/uploads/{begin(client, 4).id}/parts"
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    assert httpx.post(url, headers=headers, content=b"1234", timeout=PATIENCE_SECONDS).status_code == 400
    assert (
        httpx.post(url, headers=headers, files={"file": b"1234"}, timeout=PATIENCE_SECONDS).json()["error"]["param"]
        == "data"
    )


@pytest.fixture
def hasty(database: Database) -> Iterator[Engine]:
    """An engine that hardly waits for a lock: to it, a database that holds one is away."""
    engine = connect(database.api_url, lock_timeout_seconds=HARDLY)
    yield engine
    engine.dispose()


def test_a_completion_goes_on_without_the_database_for_as_long_as_its_lease(
    client: OpenAI, hasty: Engine, owner: Engine, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.intake._EXTEND_SECONDS", -1.0)  # at each chunk
    begun = begin(client, len(GOOD))
    part = parse_id(IdKind.PART, client.uploads.parts.create(begun.id, data=GOOD).id)
    upload_id = parse_id(IdKind.UPLOAD, begun.id)
    with tenant_transaction(hasty, tenant.id) as session:
        completion = begin_completion(session, tenant.id, upload_id=upload_id, part_ids=[part])
    held = HeldUpload(hasty, Identity(tenant.id, tenant.key_id, frozenset()), completion)
    chunks = held.keep_while([b"1", b"2", b"3", b"4"])
    with tenant_transaction(owner, tenant.id) as session:
        session.execute(text("select 1 from uploads where id = :id for update"), {"id": upload_id})
        assert next(chunks) == b"1"
    assert next(chunks) == b"2"
    assert held._completion.until > completion.until, "it was held for longer as soon as it could be"
    monkeypatch.setattr("api.intake.COMPLETION_LEASE", timedelta(0))
    with tenant_transaction(owner, tenant.id) as session:
        session.execute(text("select 1 from uploads where id = :id for update"), {"id": upload_id})
        with pytest.raises(OperationalError):
            next(chunks)
