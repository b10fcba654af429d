"""/v1/files: upload, list, read and delete files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
from fastapi.responses import StreamingResponse

from api.admission import DOWNLOADS, LISTINGS, MULTIPART_BODIES
from api.dependencies import Body, Caller, Database, Settings, Store, Transaction, needs
from api.intake import store_dataset
from api.multipart import MultipartForm, describe_multipart
from api.parameters import After, FileId, page_limit
from api.routers import TenantRouter
from api.schemas.openai.files import FileObject, FileSummary
from api.schemas.openai.lists import DeletedObject, ListObject, as_list
from api.schemas.openai.uploads import MAX_SECONDS, MIN_SECONDS, read_lifetime, require_trainable
from core.db.session import tenant_transaction
from core.domain.api_keys import Scope
from core.domain.errors import DomainError
from core.domain.files import NewFile
from core.domain.ids import IdKind, parse_id
from core.services import files as file_service
from core.services import quotas

router = TenantRouter("/v1/files", tag="files")
_MAX_LISTED = 1000
_BINARY = {"type": "string", "format": "binary"}
_BYTES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {"schema": _BINARY}}}}
_FORM = describe_multipart(
    {
        "file": _BINARY | {"description": "The file: one JSON object a line, each a row to train on."},
        "purpose": {"type": "string", "enum": ["fine-tune"], "description": "What the file is for: `fine-tune` only."},
        "expires_after[anchor]": {
            "type": "string",
            "enum": ["created_at"],
            "description": "The instant from which the seconds count: always `created_at`, when the file is made.",
        },
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": MIN_SECONDS,
            "maximum": MAX_SECONDS,
            "description": "The file's lifetime in seconds. Absent, with its anchor, for a file that stays.",
        },
    },
    required=["file", "purpose"],
)


@router.post(
    "", summary="Upload a file", dependencies=[needs(Scope.SUBMIT), Depends(MULTIPART_BODIES)], openapi_extra=_FORM
)
def create_file(
    request: Request, body: Body, caller: Caller, database: Database, store: Store, settings: Settings
) -> FileObject:
    """Store a dataset, check every row of it, and say what is wrong with them."""
    # No transaction is open while bytes flow.
    form = MultipartForm(request.headers.get("content-type", ""), body, settings.max_file_bytes)
    try:
        with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
            quotas.check_storage(session, caller.tenant_id)
        new = _store(form, store, caller)
    except DomainError:
        form.drain()
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


@router.get("", summary="List files", dependencies=[needs(Scope.READ), Depends(LISTINGS)])
def list_files(
    session: Transaction,
    caller: Caller,
    purpose: Annotated[str | None, Query(description="Show files of this purpose only.")] = None,
    limit: Annotated[int, page_limit(10_000)] = 10_000,
    order: Annotated[
        Literal["asc", "desc"], Query(description="`asc` for the oldest first, `desc` for the newest.")
    ] = "desc",
    after: After = None,
) -> ListObject[FileSummary]:
    """List files without the problems of their rows. An answer holds at most 1,000 files, whatever `limit` says."""
    cursor = None if after is None else parse_id(IdKind.FILE, after, param="after")
    most = min(limit, _MAX_LISTED)
    page = file_service.list_files(session, caller.tenant_id, purpose=purpose, after=cursor, limit=most, order=order)
    return as_list(page, FileSummary.of)


@router.get("/{file_id}", summary="Get a file", dependencies=[needs(Scope.READ)])
def get_file(session: Transaction, caller: Caller, file_id: FileId) -> FileObject:
    """Return a file with the problems of its rows."""
    row = file_service.get_file(session, caller.tenant_id, file_id=parse_id(IdKind.FILE, file_id))
    return FileObject.of(row)


@router.get(
    "/{file_id}/content",
    summary="Download a file",
    dependencies=[needs(Scope.DOWNLOAD), Depends(DOWNLOADS)],
    responses=_BYTES,
    response_description="The bytes of the file.",
    response_class=StreamingResponse,
)
def get_file_content(caller: Caller, database: Database, store: Store, file_id: FileId) -> StreamingResponse:
    """Stream the file's bytes."""
    # No transaction is open while the store is asked.
    with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
        row = file_service.get_file(session, caller.tenant_id, file_id=parse_id(IdKind.FILE, file_id))
    chunks = DOWNLOADS.iterate(store.get_stream(row.object_key))
    return StreamingResponse(
        chunks, media_type="application/octet-stream", headers={"content-length": str(row.size_bytes)}
    )


@router.delete("/{file_id}", summary="Delete a file", dependencies=[needs(Scope.SUBMIT)])
def delete_file(session: Transaction, caller: Caller, file_id: FileId) -> DeletedObject:
    """Delete a file that no unfinished job needs."""
    file_service.delete_file(session, caller.tenant_id, file_id=parse_id(IdKind.FILE, file_id))
    return DeletedObject(id=file_id, object="file")


def _store(form: MultipartForm, store: Store, caller: Caller) -> NewFile:
    lifetime: timedelta | None = None

    def checked() -> Iterator[bytes]:
        nonlocal lifetime
        yield from form.iterate_file()
        require_trainable(form.fields.get("purpose"))
        lifetime = read_lifetime(form.fields)

    new = store_dataset(checked(), store=store, tenant_id=caller.tenant_id)
    return replace(new, filename=form.filename or new.filename, lifetime=lifetime)
