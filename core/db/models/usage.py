"""Bookings of usage, one for each attempt. A booking stays when its attempt is deleted."""

from __future__ import annotations

import uuid

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Row, check_bounds
from core.domain import bounds


class Usage(Row):
    """A booking. `job_id` and `pool` are set when its attempt is deleted, because the booking stays."""

    __tablename__ = "usage"
    __table_args__ = (
        UniqueConstraint("attempt_id"),
        ForeignKeyConstraint(
            ["tenant_id", "attempt_id"],
            ["attempts.tenant_id", "attempts.id"],
            ondelete="SET NULL (attempt_id)",
        ),
        CheckConstraint("attempt_id is not null or (job_id is not null and pool is not null)", name="names_its_job"),
        Index("ix_usage_created_at", "created_at"),
        Index("ix_usage_tenant_id_created_at", "tenant_id", "created_at"),
        check_bounds("gpu_seconds", bounds.GPU_SECONDS),
        check_bounds("trained_tokens", bounds.TRAINED_TOKENS),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    attempt_id: Mapped[uuid.UUID | None]
    job_id: Mapped[uuid.UUID | None]
    pool: Mapped[str | None]
    gpu_seconds: Mapped[float]
    trained_tokens: Mapped[int]
    created_at: Mapped[CreatedAt]
