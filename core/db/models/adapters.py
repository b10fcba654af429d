"""Adapters: one for each job that has succeeded."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import UNPURGED, CreatedAt, Json, Row


class Adapter(Row):
    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("job_id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        Index("ix_adapters_tenant_id_id", "tenant_id", "id"),
        CheckConstraint("size_bytes >= 0", name="size_not_negative"),
        Index("ix_adapters_unpurged", "tenant_id", postgresql_where=UNPURGED),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    name: Mapped[str] = mapped_column(unique=True)
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"))
    object_prefix: Mapped[str]
    files: Mapped[list[Json]]
    size_bytes: Mapped[int]
    deleted_at: Mapped[dt.datetime | None]
    purged_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]
