"""Permissions: the other tenants that may read a checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from api.schemas.openai.job_requests import Text
from api.schemas.wire import Answer, RequestBody, unix_seconds
from core.db.models import CheckpointPermission
from core.domain.ids import IdKind, format_id


class CreatePermissions(RequestBody):
    """The tenants that shall read a checkpoint. OpenAI's API calls them projects."""

    project_ids: list[Annotated[Text, StringConstraints(min_length=1, max_length=64)]] = Field(
        min_length=1, max_length=100
    )
    """The tenants, each by its id or its slug."""


class PermissionObject(Answer):
    """One tenant's permission to read a checkpoint."""

    id: str
    """The permission's id, which begins with `cp_`."""
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    """The kind of this object."""
    created_at: int
    """When the permission was given, in Unix seconds."""
    project_id: str
    """The tenant that may read the checkpoint, as the request named it."""

    @classmethod
    def of(cls, row: CheckpointPermission) -> PermissionObject:
        return cls(
            id=format_id(IdKind.PERMISSION, row.id),
            created_at=unix_seconds(row.created_at),
            project_id=row.project_id,
        )
