"""/v1/uploads: large files in parts. Each part goes to the object store as it arrives; all are put together there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

from fastapi import Depends, Request

from api.admission import COMPLETIONS, MULTIPART_BODIES
from api.dependencies import Body, Caller, Database, Now, Store, Transaction, needs
from api.intake import HeldUpload, store_dataset
from api.multipart import MultipartForm, describe_multipart, display_name
from api.parameters import UploadId
from api.routers import TenantRouter
from api.schemas.openai.uploads import (
    MAX_PART_BYTES,
    CompleteUpload,
    CreateUpload,
    PartObject,
    UploadObject,
    require_trainable,
)
from core.db.models import Upload
from core.db.session import tenant_transaction
from core.domain.api_keys import Scope
from core.domain.errors import DomainError, InvalidRequestError, NotFoundError
from core.domain.files import NewFile
from core.domain.ids import IdKind, new_id, parse_id
from core.domain.objects import upload_prefix
from core.services import quotas, uploads
from core.services.uploads import NewPart, NewUpload
from core.storage import ObjectStore

router = TenantRouter("/v1/uploads", tag="uploads")
_PART_FORM = describe_multipart(
    {"data": {"type": "string", "format": "binary", "description": "The part's bytes, at most 64 MiB."}},
    required=["data"],
)


@router.post("", summary="Begin an upload", dependencies=[needs(Scope.SUBMIT)])
def create_upload(database: Database, caller: Caller, now: Now, body: CreateUpload) -> UploadObject:
    """Begin an upload in parts. The size that it promises counts as stored from here on."""
    # The transaction ends here: others may wait for its lock in every thread that there is.
    require_trainable(body.purpose)
    new = NewUpload(
        filename=display_name(body.filename.encode()),
        purpose=body.purpose,
        mime_type=body.mime_type,
        size_bytes=body.bytes,
        file_lifetime=timedelta(seconds=body.expires_after.seconds) if body.expires_after else None,
    )
    with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
        quotas.reserve_storage(session, caller.tenant_id, num_bytes=new.size_bytes)
        upload = uploads.create_upload(session, caller.tenant_id, new=new)
    return UploadObject.of(upload, now=now)


@router.post(
    "/{upload_id}/parts",
    summary="Add a part",
    dependencies=[needs(Scope.SUBMIT), Depends(MULTIPART_BODIES)],
    openapi_extra=_PART_FORM,
)
def add_part(
    request: Request, body: Body, caller: Caller, database: Database, store: Store, upload_id: UploadId
) -> PartObject:
    """Store one part, of at most 64 MiB."""
    # No transaction is open while bytes flow.
    row_id = parse_id(IdKind.UPLOAD, upload_id)
    with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
        uploads.require_pending(session, caller.tenant_id, upload_id=row_id)
    form = MultipartForm(request.headers.get("content-type", ""), body, MAX_PART_BYTES, file_field="data")
    part_id = new_id()
    object_key = f"{upload_prefix(caller.tenant_id, row_id)}{part_id}"
    try:
        stored = store.put_stream(object_key, form.iterate_file(), content_type="application/octet-stream")
    except DomainError:
        form.drain()
        raise
    try:
        with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
            new = NewPart(part_id, object_key, stored.size_bytes)
            return PartObject.of(uploads.add_part(session, caller.tenant_id, upload_id=row_id, new=new))
    except DomainError:
        store.delete(object_key)
        raise


@router.post(
    "/{upload_id}/complete", summary="Complete an upload", dependencies=[needs(Scope.SUBMIT), Depends(COMPLETIONS)]
)
def complete_upload(
    caller: Caller, database: Database, store: Store, now: Now, upload_id: UploadId, body: CompleteUpload
) -> UploadObject:
    """Put the parts together to a file and check its rows. Completing a completed upload returns it."""
    row_id = parse_id(IdKind.UPLOAD, upload_id)
    with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
        upload = uploads.get_upload(session, caller.tenant_id, upload_id=row_id)
        if upload.status == "completed":
            return UploadObject.of(upload, now=now, file=uploads.find_file(session, upload))
        part_ids = _parse_part_ids(body.part_ids)
        begun = uploads.begin_completion(session, caller.tenant_id, upload_id=row_id, part_ids=part_ids)
    with HeldUpload(database, caller, begun) as held:
        chunks = held.keep_while(_read_parts(store, begun.part_keys, md5=body.md5))
        file = _describe(store_dataset(chunks, store=store, tenant_id=caller.tenant_id), upload)
        try:
            upload, row = held.complete(file)
        except DomainError:
            store.delete(file.object_key)
            raise
    return UploadObject.of(upload, now=now, file=row)


@router.post("/{upload_id}/cancel", summary="Cancel an upload", dependencies=[needs(Scope.SUBMIT)])
def cancel_upload(session: Transaction, caller: Caller, now: Now, upload_id: UploadId) -> UploadObject:
    """Give an upload up and delete its parts."""
    row_id = parse_id(IdKind.UPLOAD, upload_id)
    return UploadObject.of(uploads.cancel_upload(session, caller.tenant_id, upload_id=row_id), now=now)


def _parse_part_ids(part_ids: Iterable[str]) -> list[UUID]:
    try:
        return [parse_id(IdKind.PART, part_id) for part_id in part_ids]
    except NotFoundError as error:
        raise InvalidRequestError(uploads.UNKNOWN_PART, param="part_ids") from error


def _read_parts(store: ObjectStore, object_keys: Iterable[str], *, md5: str | None) -> Iterator[bytes]:
    digest = hashlib.md5(usedforsecurity=False)
    for object_key in object_keys:
        for chunk in store.get_stream(object_key):
            digest.update(chunk)
            yield chunk
    if md5 is not None and digest.hexdigest() != md5.lower():
        raise InvalidRequestError(
            f"The MD5 of the parts in this order is {digest.hexdigest()}.", code="checksum_mismatch", param="md5"
        )


def _describe(file: NewFile, upload: Upload) -> NewFile:
    lifetime = None if upload.file_lifetime_seconds is None else timedelta(seconds=upload.file_lifetime_seconds)
    return replace(file, filename=upload.filename, lifetime=lifetime)
