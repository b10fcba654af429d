"""Resume points: stored states from which a job's next attempt resumes."""

from __future__ import annotations

import uuid

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Json, Row


class ResumePoint(Row):
    """The stored state of a slot, from which the job's next attempt resumes."""

    __tablename__ = "resume_points"
    __table_args__ = (
        UniqueConstraint("job_id", "lease_token", "step"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        CheckConstraint("step > 0", name="step_positive"),
        CheckConstraint("size_bytes >= 0", name="size_not_negative"),
        Index("ix_resume_points_tenant_id", "tenant_id"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    lease_token: Mapped[int]
    step: Mapped[int]
    object_prefix: Mapped[str]
    files: Mapped[list[Json]]
    size_bytes: Mapped[int] = mapped_column(server_default="0")
    created_at: Mapped[CreatedAt]
