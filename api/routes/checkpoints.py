"""/v1/fine_tuning/checkpoints: a checkpoint by its model name, its files, and who else may read it.

Model names hold slashes and colons and come unescaped, so they are read as paths.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from api.dependencies import Caller, Now, Settings, Store, Transaction, needs
from api.routing import OneThreadRoute
from api.schemas.objects import (
    CheckpointObject,
    DeletedObject,
    DownloadFile,
    DownloadObject,
    ListObject,
    as_list,
)
from api.schemas.sharing import CreatePermissions, PermissionObject
from core.domain.api_keys import Scope
from core.domain.ids import IdKind, format_id, parse_id
from core.domain.values import Page
from core.services import checkpoints

router = APIRouter(prefix="/v1/fine_tuning/checkpoints", tags=["checkpoints"], route_class=OneThreadRoute)


@router.post("/{checkpoint:path}/permissions", dependencies=[needs(Scope.ADMIN)])
def create_permissions(
    session: Transaction, caller: Caller, checkpoint: str, body: CreatePermissions
) -> ListObject[PermissionObject]:
    """Let other tenants read a checkpoint. A project is a tenant, by its id or slug; whether it exists is not told."""
    made = checkpoints.share_checkpoint(session, caller.tenant_id, name=checkpoint, project_ids=body.project_ids)
    return as_list(Page(items=tuple(made), has_more=False), PermissionObject.of)


@router.get("/{checkpoint:path}/permissions", dependencies=[needs(Scope.ADMIN)])
def list_permissions(
    session: Transaction,
    caller: Caller,
    checkpoint: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    after: str | None = None,
    order: Literal["ascending", "descending"] = "descending",
    project_id: str | None = None,
) -> ListObject[PermissionObject]:
    page = checkpoints.list_permissions(
        session,
        caller.tenant_id,
        name=checkpoint,
        after=None if after is None else parse_id(IdKind.PERMISSION, after, param="after"),
        limit=limit,
        order=order,
        project_id=project_id,
    )
    return as_list(page, PermissionObject.of)


@router.delete("/{checkpoint:path}/permissions/{permission_id}", dependencies=[needs(Scope.ADMIN)])
def delete_permission(session: Transaction, caller: Caller, checkpoint: str, permission_id: str) -> DeletedObject:
    row_id = parse_id(IdKind.PERMISSION, permission_id)
    checkpoints.revoke_permission(session, caller.tenant_id, name=checkpoint, permission_id=row_id)
    return DeletedObject(id=permission_id, object="checkpoint.permission")


@router.get("/{checkpoint:path}/download", dependencies=[needs(Scope.DOWNLOAD)])
def download_checkpoint(
    session: Transaction, caller: Caller, store: Store, settings: Settings, now: Now, checkpoint: str
) -> DownloadObject:
    """Return one presigned URL a file of the adapter as it was at that step."""
    row = checkpoints.find_checkpoint(session, caller.tenant_id, name=checkpoint)
    lifetime = caller.limit_lifetime(timedelta(seconds=settings.presign_seconds), now=now)
    urls = [
        DownloadFile(
            url=store.presign_get(row.object_prefix + file["name"], expires=lifetime, filename=file["name"]), **file
        )
        for file in row.files
    ]
    return DownloadObject(
        id=format_id(IdKind.CHECKPOINT, row.id),
        object="checkpoint.download",
        expires_at=int((now + lifetime).timestamp()),
        files=urls,
    )


@router.get("/{checkpoint:path}", dependencies=[needs(Scope.READ)])
def get_checkpoint(session: Transaction, caller: Caller, checkpoint: str) -> CheckpointObject:
    return CheckpointObject.of(checkpoints.find_checkpoint(session, caller.tenant_id, name=checkpoint))
