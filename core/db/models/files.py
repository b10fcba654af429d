"""Files: datasets that tenants upload, and result files that the service writes for them."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import UNPURGED, CreatedAt, Json, Row


class File(Row):
    __tablename__ = "files"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        CheckConstraint("status in ('processed', 'error')", name="status_known"),
        CheckConstraint("purpose in ('fine-tune', 'fine-tune-results')", name="purpose_known"),
        CheckConstraint("size_bytes >= 0 and num_examples >= 0", name="counts_not_negative"),
        CheckConstraint("length(sha256) = 64", name="sha256_form"),
        Index("ix_files_tenant_id_id_live", "tenant_id", "id", postgresql_where=text("deleted_at is null")),
        Index("ix_files_purged_at", "purged_at", "id", postgresql_where=text("purged_at is not null")),
        Index("ix_files_unpurged", "tenant_id", postgresql_where=UNPURGED),
        Index(
            "ix_files_expires_at",
            "expires_at",
            postgresql_where=text("deleted_at is null and expires_at is not null"),
        ),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    size_bytes: Mapped[int]
    sha256: Mapped[str]
    object_key: Mapped[str]
    num_examples: Mapped[int]
    status: Mapped[str]
    status_details: Mapped[str | None]
    problems: Mapped[list[Json]] = mapped_column(server_default=text("'[]'::jsonb"))
    report: Mapped[Json] = mapped_column(server_default=text("'{}'::jsonb"))
    expires_at: Mapped[dt.datetime | None]
    deleted_at: Mapped[dt.datetime | None]
    purged_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]
