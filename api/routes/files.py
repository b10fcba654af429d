"""/v1/files: datasets are checked line by line while they stream to the object store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse

from api.admission import DOWNLOADS, LISTINGS, UPLOADS
from api.dependencies import Body, Caller, Database, Settings, Store, Transaction, needs
from api.intake import store_dataset
from api.routing import OneThreadRoute
from api.schemas.objects import DeletedObject, FileObject, FileSummary, ListObject, as_list
from api.schemas.uploads import MAX_SECONDS, MIN_SECONDS, read_lifetime, require_trainable
from api.uploads import MultipartUpload, describe_form
from core.db.session import tenant_transaction
from core.domain.api_keys import Scope
from core.domain.errors import DomainError
from core.domain.files import NewFile
from core.domain.ids import IdKind, parse_id
from core.services import files as file_service
from core.services import quotas

router = APIRouter(prefix="/v1/files", tags=["files"], route_class=OneThreadRoute)
_MAX_LISTED = 1000
_BINARY = {"type": "string", "format": "binary"}
_BYTES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {"schema": _BINARY}}}}
_FORM = describe_form(
    {
        "file": _BINARY,
        "purpose": {"type": "string", "enum": ["fine-tune"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_SECONDS, "maximum": MAX_SECONDS},
    },
    required=["file", "purpose"],
)


@router.post("", dependencies=[needs(Scope.SUBMIT), Depends(UPLOADS)], openapi_extra=_FORM)
def create_file(
    request: Request, body: Body, caller: Caller, database: Database, store: Store, settings: Settings
) -> FileObject:
    """Store an upload and say what is wrong with its rows, if anything. No transaction is open while bytes flow."""
    upload = MultipartUpload(request.headers.get("content-type", ""), body, settings.max_file_bytes)
    try:
        with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
            quotas.check_storage(session, caller.tenant_id)
        new = _store(upload, store, caller)
    except DomainError:
        upload.drain()
        raise
    try:
        with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
            quotas.reserve_storage(session, caller.tenant_id, num_bytes=new.size_bytes)
            row = file_service.create_file(session, caller.tenant_id, new=new)
            session.refresh(row)
    except DomainError:
        store.delete(new.object_key)
        raise
    return FileObject.of(row)


@router.get("", dependencies=[needs(Scope.READ), Depends(LISTINGS)])
def list_files(
    session: Transaction,
    caller: Caller,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> ListObject[FileSummary]:
    """List files without their problems, at most 1,000 an answer, whatever limit is asked for: see `has_more`."""
    cursor = None if after is None else parse_id(IdKind.FILE, after, param="after")
    most = min(limit, _MAX_LISTED)
    page = file_service.list_files(session, caller.tenant_id, purpose=purpose, after=cursor, limit=most, order=order)
    return as_list(page, FileSummary.of)


@router.get("/{file_id}", dependencies=[needs(Scope.READ)])
def get_file(session: Transaction, caller: Caller, file_id: str) -> FileObject:
    row = file_service.get_file(session, caller.tenant_id, file_id=parse_id(IdKind.FILE, file_id))
    return FileObject.of(row)


@router.get(
    "/{file_id}/content",
    dependencies=[needs(Scope.DOWNLOAD), Depends(DOWNLOADS)],
    responses=_BYTES,
    response_class=StreamingResponse,
)
def get_file_content(caller: Caller, database: Database, store: Store, file_id: str) -> StreamingResponse:
    """Stream a file. No transaction is open while the store is asked."""
    with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
        row = file_service.get_file(session, caller.tenant_id, file_id=parse_id(IdKind.FILE, file_id))
    chunks = DOWNLOADS.iterate(store.get_stream(row.object_key))
    return StreamingResponse(
        chunks, media_type="application/octet-stream", headers={"content-length": str(row.size_bytes)}
    )


@router.delete("/{file_id}", dependencies=[needs(Scope.SUBMIT)])
def delete_file(session: Transaction, caller: Caller, file_id: str) -> DeletedObject:
    file_service.delete_file(session, caller.tenant_id, file_id=parse_id(IdKind.FILE, file_id))
    return DeletedObject(id=file_id, object="file")


def _store(upload: MultipartUpload, store: Store, caller: Caller) -> NewFile:
    lifetime: timedelta | None = None

    def checked() -> Iterator[bytes]:
        nonlocal lifetime
        yield from upload.iterate_file()
        require_trainable(upload.fields.get("purpose"))
        lifetime = read_lifetime(upload.fields)

    new = store_dataset(checked(), store=store, tenant_id=caller.tenant_id)
    return replace(new, filename=upload.filename or new.filename, lifetime=lifetime)
