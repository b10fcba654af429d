"""The history that a tenant reads of a job: its events, and the log lines of its workers."""

from __future__ import annotations

import uuid

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Identity, Index
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Json, Row


class Event(Row):
    __tablename__ = "events"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        CheckConstraint("level in ('info', 'warn', 'error')", name="level_known"),
        CheckConstraint("type in ('message', 'metrics')", name="type_known"),
        Index("ix_events_job_id_number", "job_id", "number"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # No index on it alone: the planner would use it to find a job's newest rows, and scan all jobs' rows.
    number: Mapped[int] = mapped_column(Identity(always=True))
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    details: Mapped[Json | None]
    created_at: Mapped[CreatedAt]


class LogLine(Row):
    """A line that a worker wrote about one job, in names and numbers. It never quotes a row."""

    __tablename__ = "log_lines"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        CheckConstraint("level in ('info', 'warn', 'error')", name="level_known"),
        CheckConstraint("length(name) between 1 and 100", name="name_length"),
        CheckConstraint("octet_length(details::text) <= 4096", name="details_size"),
        Index("ix_log_lines_job_id_number", "job_id", "number"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # No index on it alone: the planner would use it to find a job's newest rows, and scan all jobs' rows.
    number: Mapped[int] = mapped_column(Identity(always=True))
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    attempt_number: Mapped[int]
    level: Mapped[str]
    name: Mapped[str]
    details: Mapped[Json]
    created_at: Mapped[CreatedAt]
