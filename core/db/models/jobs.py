"""Jobs. CHECKs tie a job's columns to its status: a lease exactly while it runs, an end exactly once it is over."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Json, Row, check_bounds, check_known
from core.domain import bounds
from core.domain.jobs import MAX_ATTEMPTS, JobStatus

_NOT_RUNNING = text("status <> 'running'")


class Job(Row):
    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        UniqueConstraint("tenant_id", "name_digits"),
        ForeignKeyConstraint(["tenant_id", "training_file_id"], ["files.tenant_id", "files.id"]),
        ForeignKeyConstraint(["tenant_id", "validation_file_id"], ["files.tenant_id", "files.id"]),
        check_known("status", JobStatus),
        CheckConstraint("quantization in ('nf4')", name="quantization_known"),
        CheckConstraint(
            "(status = 'running') = (lease_token is not null and lease_until is not null)", name="lease_while_running"
        ),
        CheckConstraint(
            "(status in ('succeeded', 'failed', 'cancelled')) = (finished_at is not null)",
            name="finished_when_terminal",
        ),
        CheckConstraint("deleted_at is null or finished_at is not null", name="ended_when_deleted"),
        CheckConstraint("(status = 'succeeded') = (fine_tuned_model is not null)", name="model_when_succeeded"),
        CheckConstraint("(status = 'failed') = (error is not null)", name="error_when_failed"),
        CheckConstraint("attempt_count between 0 and max_attempts", name="attempts_bounded"),
        CheckConstraint("pause_requested_at is null or status = 'running'", name="pause_requested_while_running"),
        CheckConstraint("length(suffix) between 1 and 64", name="suffix_length"),
        CheckConstraint("name_digits ~ '^[0-9a-f]{8}$'", name="name_digits_form"),
        CheckConstraint("total_steps >= 0", name="total_steps_not_negative"),
        CheckConstraint("skipped_steps >= 0", name="skipped_steps_not_negative"),
        CheckConstraint("length(traceparent) <= 100", name="traceparent_length"),
        check_bounds("priority", bounds.PRIORITY),
        Index(
            "ix_jobs_claimable",
            "pool",
            "tenant_id",
            text("priority desc"),
            "id",
            postgresql_where=text("status = 'queued'"),
        ),
        Index("ix_jobs_waiting", "tenant_id", postgresql_where=text("status in ('validating_files', 'queued')")),
        Index("ix_jobs_unswept", "finished_at", postgresql_where=text("swept_at is null")),
        Index("ix_jobs_finished_at", "finished_at", "id", postgresql_where=text("finished_at is not null")),
        Index(
            "ix_jobs_to_erase",
            "deleted_at",
            "id",
            postgresql_where=text("deleted_at is not null and (blanked_at is null or swept_at is not null)"),
        ),
        Index("ix_jobs_running", "tenant_id", "lease_until", postgresql_where=text("status = 'running'")),
        Index("ix_jobs_training_file_id", "training_file_id"),
        Index(
            "ix_jobs_validation_file_id", "validation_file_id", postgresql_where=text("validation_file_id is not null")
        ),
        Index("ix_jobs_result_file_id", "result_file_id", postgresql_where=text("result_file_id is not null")),
        Index("ix_jobs_pool_status_id", "pool", "status", "id", postgresql_where=_NOT_RUNNING),
        Index("ix_jobs_tenant_id_pool_status_id", "tenant_id", "pool", "status", "id", postgresql_where=_NOT_RUNNING),
        Index(
            "ix_jobs_suspect",
            "pool",
            "id",
            postgresql_where=text("status = 'queued' and suspect_step is not null"),
        ),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"))
    quantization: Mapped[str | None]
    pool: Mapped[str]
    training_file_id: Mapped[uuid.UUID]
    validation_file_id: Mapped[uuid.UUID | None]
    suffix: Mapped[str | None]
    # The last part of its model's name. It is unique for each tenant, so the name is free when the adapter is ready.
    name_digits: Mapped[str] = mapped_column(server_default=text("right(gen_random_uuid()::text, 8)"))
    # SQLAlchemy reserves the attribute `metadata`; `job_metadata` maps to the column of that name.
    job_metadata: Mapped[Json] = mapped_column("metadata", server_default=text("'{}'::jsonb"))
    spec: Mapped[Json]
    request_hash: Mapped[bytes | None]
    total_steps: Mapped[int]
    priority: Mapped[int] = mapped_column(server_default="0")
    status: Mapped[str]
    run_after: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    attempt_count: Mapped[int] = mapped_column(server_default="0")
    max_attempts: Mapped[int] = mapped_column(server_default=str(MAX_ATTEMPTS))
    lease_token: Mapped[int | None]
    lease_until: Mapped[dt.datetime | None]
    pause_requested_at: Mapped[dt.datetime | None]
    # The step that the job had reached when its trainer died. The job runs alone until it is acquitted.
    suspect_step: Mapped[int | None]
    num_suspicions: Mapped[int] = mapped_column(server_default="0")
    # How many attempts in a row were not counted and reached no step beyond the furthest one so far.
    num_uncounted: Mapped[int] = mapped_column(server_default="0")
    furthest_step: Mapped[int] = mapped_column(server_default="0")
    trained_steps: Mapped[int] = mapped_column(server_default="0")
    # How many of the trained steps changed nothing, because their gradient was not finite.
    skipped_steps: Mapped[int] = mapped_column(server_default="0")
    # How many rows of its files are used, truncated or dropped, once an attempt has read them.
    datasets: Mapped[Json | None]
    trained_tokens: Mapped[int | None]
    fine_tuned_model: Mapped[str | None] = mapped_column(unique=True)
    result_file_id: Mapped[uuid.UUID | None]
    error: Mapped[Json | None]
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]
    swept_at: Mapped[dt.datetime | None]
    # When its tenant deleted it, and when its names were blanked. The row stays until no late write is possible.
    deleted_at: Mapped[dt.datetime | None]
    blanked_at: Mapped[dt.datetime | None]
    # The span of its submission as a W3C traceparent, where traces are on.
    traceparent: Mapped[str | None]
    created_at: Mapped[CreatedAt]
