"""Published checkpoints, and which other tenants may read each."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import UNPURGED, CreatedAt, Json, Row


class Checkpoint(Row):
    __tablename__ = "checkpoints"
    __table_args__ = (
        UniqueConstraint("job_id", "step"),
        UniqueConstraint("tenant_id", "id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        Index("ix_checkpoints_tenant_id_model_name", "tenant_id", "model_name"),
        CheckConstraint("size_bytes >= 0", name="size_not_negative"),
        Index("ix_checkpoints_unpurged", "tenant_id", postgresql_where=UNPURGED),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    lease_token: Mapped[int]
    step: Mapped[int]
    model_name: Mapped[str]
    object_prefix: Mapped[str]
    files: Mapped[list[Json]]
    size_bytes: Mapped[int] = mapped_column(server_default="0")
    metrics: Mapped[Json]
    deleted_at: Mapped[dt.datetime | None]
    purged_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class CheckpointPermission(Row):
    """Allows another tenant, named by its wire id or slug, to read a checkpoint."""

    __tablename__ = "checkpoint_permissions"
    __table_args__ = (
        UniqueConstraint("checkpoint_id", "project_id"),
        ForeignKeyConstraint(
            ["tenant_id", "checkpoint_id"], ["checkpoints.tenant_id", "checkpoints.id"], ondelete="CASCADE"
        ),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    checkpoint_id: Mapped[uuid.UUID]
    project_id: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[CreatedAt]
