"""Uploads and their parts. A completed upload names the file that it has become."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Row, check_bounds
from core.domain import bounds


class Upload(Row):
    __tablename__ = "uploads"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        ForeignKeyConstraint(["tenant_id", "file_id"], ["files.tenant_id", "files.id"]),
        CheckConstraint("status in ('pending', 'completing', 'completed', 'cancelled')", name="status_known"),
        CheckConstraint(
            "(status = 'completing') = (completing_until is not null)", name="completing_until_while_completing"
        ),
        CheckConstraint("(status = 'completed') = (file_id is not null)", name="file_when_completed"),
        check_bounds("size_bytes", bounds.UPLOAD_BYTES),
        check_bounds("file_lifetime_seconds", bounds.FILE_SECONDS),
        Index("ix_uploads_file_id", "file_id", postgresql_where=text("file_id is not null")),
        Index("ix_uploads_unpurged", "tenant_id", postgresql_where=text("purged_at is null")),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    mime_type: Mapped[str]
    size_bytes: Mapped[int]
    file_lifetime_seconds: Mapped[int | None]
    status: Mapped[str] = mapped_column(server_default="pending")
    completing_until: Mapped[dt.datetime | None]
    file_id: Mapped[uuid.UUID | None]
    expires_at: Mapped[dt.datetime]
    purged_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class UploadPart(Row):
    __tablename__ = "upload_parts"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "upload_id"], ["uploads.tenant_id", "uploads.id"]),
        Index("ix_upload_parts_tenant_id_upload_id", "tenant_id", "upload_id"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    upload_id: Mapped[uuid.UUID]
    object_key: Mapped[str]
    size_bytes: Mapped[int]
    created_at: Mapped[CreatedAt]
