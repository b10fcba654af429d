"""/v1/fine_tuning/checkpoints: a checkpoint by its model name, its files, and who else may read it.

Model names contain slashes and colons, and clients do not escape them, so they are declared as paths.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from fastapi import Query

from api.dependencies import Caller, Now, Settings, Store, Transaction, needs
from api.parameters import After, CheckpointName, PermissionId, page_limit
from api.routers import TenantRouter
from api.schemas.adapters import DownloadFile, DownloadObject
from api.schemas.openai.checkpoints import CheckpointObject
from api.schemas.openai.lists import DeletedObject, ListObject, as_list
from api.schemas.openai.permissions import CreatePermissions, PermissionObject
from core.domain.api_keys import Scope
from core.domain.ids import IdKind, format_id, parse_id
from core.domain.values import Page, StoredArtifact
from core.services import checkpoints

router = TenantRouter("/v1/fine_tuning/checkpoints", tag="checkpoints")


@router.post("/{checkpoint:path}/permissions", summary="Share a checkpoint", dependencies=[needs(Scope.ADMIN)])
def create_permissions(
    session: Transaction, caller: Caller, checkpoint: CheckpointName, body: CreatePermissions
) -> ListObject[PermissionObject]:
    """Let other tenants read a checkpoint. The answer does not tell whether a tenant of that name exists."""
    made = checkpoints.share_checkpoint(session, caller.tenant_id, name=checkpoint, project_ids=body.project_ids)
    return as_list(Page(items=tuple(made), has_more=False), PermissionObject.of)


@router.get(
    "/{checkpoint:path}/permissions", summary="List who may read a checkpoint", dependencies=[needs(Scope.ADMIN)]
)
def list_permissions(
    session: Transaction,
    caller: Caller,
    checkpoint: CheckpointName,
    limit: Annotated[int, page_limit(100)] = 10,
    after: After = None,
    order: Annotated[
        Literal["ascending", "descending"],
        Query(description="`ascending` for the oldest first, `descending` for the newest."),
    ] = "descending",
    project_id: Annotated[str | None, Query(description="Show the permissions of this tenant only.")] = None,
) -> ListObject[PermissionObject]:
    """List the permissions of a checkpoint."""
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


@router.delete(
    "/{checkpoint:path}/permissions/{permission_id}",
    summary="Stop sharing a checkpoint",
    dependencies=[needs(Scope.ADMIN)],
)
def delete_permission(
    session: Transaction, caller: Caller, checkpoint: CheckpointName, permission_id: PermissionId
) -> DeletedObject:
    """Take a permission back."""
    row_id = parse_id(IdKind.PERMISSION, permission_id)
    checkpoints.revoke_permission(session, caller.tenant_id, name=checkpoint, permission_id=row_id)
    return DeletedObject(id=permission_id, object="checkpoint.permission")


@router.get("/{checkpoint:path}/download", summary="Download a checkpoint", dependencies=[needs(Scope.DOWNLOAD)])
def download_checkpoint(
    session: Transaction, caller: Caller, store: Store, settings: Settings, now: Now, checkpoint: CheckpointName
) -> DownloadObject:
    """Return one presigned URL for each file of the adapter as it was at that step."""
    row = checkpoints.find_checkpoint(session, caller.tenant_id, name=checkpoint)
    artifact = StoredArtifact.of_row(row.object_prefix, row.files)
    lifetime = caller.limit_lifetime(timedelta(seconds=settings.presign_seconds), now=now)
    urls = [
        DownloadFile.at(
            store.presign_get(artifact.object_prefix + file.name, expires=lifetime, filename=file.name), file
        )
        for file in artifact.files
    ]
    return DownloadObject(
        id=format_id(IdKind.CHECKPOINT, row.id),
        object="checkpoint.download",
        expires_at=int((now + lifetime).timestamp()),
        files=urls,
    )


@router.get("/{checkpoint:path}", summary="Get a checkpoint", dependencies=[needs(Scope.READ)])
def get_checkpoint(session: Transaction, caller: Caller, checkpoint: CheckpointName) -> CheckpointObject:
    """Return a checkpoint of the caller, or one that was shared with it."""
    return CheckpointObject.of(checkpoints.find_checkpoint(session, caller.tenant_id, name=checkpoint))
