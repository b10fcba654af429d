"""/v1/adapters: finished adapters, and their files as presigned URLs or as one archive."""

from __future__ import annotations

import tarfile
from collections.abc import Generator
from datetime import timedelta
from typing import Annotated, Any, Literal

from fastapi import Depends, Query
from fastapi.responses import StreamingResponse

from api.admission import DOWNLOADS
from api.dependencies import Caller, Now, Settings, Store, Transaction, hold_place_for_archive, needs
from api.parameters import AdapterId, After, page_limit
from api.routers import TenantRouter
from api.schemas.adapters import AdapterObject, DownloadFile, DownloadObject
from api.schemas.openai.lists import ListObject, as_list
from core.domain.api_keys import Scope
from core.domain.ids import IdKind, parse_id
from core.domain.values import StoredArtifact
from core.services import adapters
from core.storage import ObjectStore

router = TenantRouter("/v1/adapters", tag="adapters")


@router.get("", summary="List adapters", dependencies=[needs(Scope.READ)])
def list_adapters(
    session: Transaction, caller: Caller, limit: Annotated[int, page_limit(100)] = 20, after: After = None
) -> ListObject[AdapterObject]:
    """List the finished adapters, newest first."""
    cursor = None if after is None else parse_id(IdKind.ADAPTER, after, param="after")
    return as_list(adapters.list_adapters(session, caller.tenant_id, after=cursor, limit=limit), AdapterObject.of)


@router.get("/{adapter_id}", summary="Get an adapter", dependencies=[needs(Scope.READ)])
def get_adapter(session: Transaction, caller: Caller, adapter_id: AdapterId) -> AdapterObject:
    """Return a finished adapter: its shape and its files."""
    found = adapters.get_adapter(session, caller.tenant_id, adapter_id=parse_id(IdKind.ADAPTER, adapter_id))
    return AdapterObject.of(found)


@router.get(
    "/{adapter_id}/download",
    summary="Download an adapter",
    response_model=DownloadObject,
    response_description="Where the files can be downloaded for a while, or the files as one tar archive.",
    dependencies=[needs(Scope.DOWNLOAD), Depends(hold_place_for_archive)],
)
def download_adapter(
    session: Transaction,
    caller: Caller,
    store: Store,
    settings: Settings,
    now: Now,
    adapter_id: AdapterId,
    archive: Annotated[
        Literal["tar"] | None, Query(description="`tar` streams all files as one archive. Absent for URLs.")
    ] = None,
) -> Any:
    """Return one presigned URL for each file, or stream all files as one tar archive."""
    row = adapters.get_adapter(session, caller.tenant_id, adapter_id=parse_id(IdKind.ADAPTER, adapter_id)).row
    artifact = StoredArtifact.of_row(row.object_prefix, row.files)
    if archive == "tar":
        disposition = {"content-disposition": f'attachment; filename="{adapter_id}.tar"'}
        chunks = DOWNLOADS.iterate(_stream_tar(store, artifact))
        return StreamingResponse(chunks, media_type="application/x-tar", headers=disposition)
    lifetime = caller.limit_lifetime(timedelta(seconds=settings.presign_seconds), now=now)
    urls = [
        DownloadFile.at(
            store.presign_get(artifact.object_prefix + file.name, expires=lifetime, filename=file.name), file
        )
        for file in artifact.files
    ]
    return DownloadObject(id=adapter_id, expires_at=int((now + lifetime).timestamp()), files=urls)


def _stream_tar(store: ObjectStore, artifact: StoredArtifact) -> Generator[bytes]:
    """Yield an uncompressed tar in constant memory. Headers are made here, contents pass through."""
    for file in artifact.files:
        entry = tarfile.TarInfo(file.name)
        entry.size = file.size_bytes
        yield entry.tobuf(format=tarfile.USTAR_FORMAT)
        yield from store.get_stream(artifact.object_prefix + file.name)
        yield bytes(-entry.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
