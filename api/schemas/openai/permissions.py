"""Checkpoint permissions on the wire."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from api.schemas.openai.job_requests import Text
from core.db.models import CheckpointPermission
from core.domain.ids import IdKind, format_id


class CreatePermissions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    project_ids: list[Annotated[Text, StringConstraints(min_length=1, max_length=64)]] = Field(
        min_length=1, max_length=100
    )


class PermissionObject(BaseModel):
    id: str
    object: str = "checkpoint.permission"
    created_at: int
    project_id: str

    @classmethod
    def of(cls, row: CheckpointPermission) -> PermissionObject:
        return cls(
            id=format_id(IdKind.PERMISSION, row.id),
            created_at=int(row.created_at.timestamp()),
            project_id=row.project_id,
        )
