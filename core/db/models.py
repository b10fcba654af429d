"""The tables. Every tenant-owned row carries `tenant_id`, and composite keys keep references inside one tenant.

What SQL can promise, SQL promises: legal statuses, a lease exactly while running, one adapter a job, one usage row an
attempt. Row-level security on every tenant-owned table stands in the migrations.
"""

from __future__ import annotations

import datetime as dt
import uuid
from enum import StrEnum

from sqlalchemy import (
    ARRAY,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Sequence,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Json, Row
from core.domain.api_keys import Scope
from core.domain.jobs import MAX_ATTEMPTS, AttemptOutcome, JobStatus

LEASE_TOKENS = Sequence("lease_tokens", metadata=Row.metadata)
_UNPURGED = text("deleted_at is not null and purged_at is null")


def _one_of(column: str, values: type[StrEnum]) -> str:
    return f"{column} in ({_quoted(values)})"


def _quoted(values: type[StrEnum]) -> str:
    return ", ".join(repr(str(value)) for value in values)


class Tenant(Row):
    __tablename__ = "tenants"
    __table_args__ = (
        CheckConstraint("slug ~ '^[a-z0-9][a-z0-9-]{0,31}$'", name="slug_form"),
        CheckConstraint("weight > 0", name="weight_positive"),
        CheckConstraint("max_running >= 0 and max_queued >= 0", name="quotas_not_negative"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    weight: Mapped[float] = mapped_column(server_default="1")
    usage: Mapped[float] = mapped_column(server_default="0")
    usage_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    max_running: Mapped[int] = mapped_column(server_default="8")
    max_queued: Mapped[int] = mapped_column(server_default="1000")
    disabled_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class ApiKeyRow(Row):
    __tablename__ = "api_keys"
    __table_args__ = (
        CheckConstraint("length(secret_hash) = 32", name="secret_hash_length"),
        CheckConstraint(f"scopes <@ array[{_quoted(Scope)}] and scopes <> '{{}}'", name="scopes_known"),
        CheckConstraint("length(name) between 1 and 64", name="name_length"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), index=True)
    key_id: Mapped[str] = mapped_column(unique=True)
    secret_hash: Mapped[bytes]
    name: Mapped[str]
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    expires_at: Mapped[dt.datetime | None]
    last_used_at: Mapped[dt.datetime | None]
    revoked_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class BaseModelRow(Row):
    __tablename__ = "base_models"
    __table_args__ = (
        CheckConstraint("max_seq_len >= 8 and max_rank >= 1 and slots >= 1", name="limits_positive"),
        CheckConstraint("cardinality(target_modules) > 0", name="has_target_modules"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[Json]
    dtype: Mapped[str]
    quantizations: Mapped[list[str]] = mapped_column(ARRAY(Text))
    target_modules: Mapped[list[str]] = mapped_column(ARRAY(Text))
    max_seq_len: Mapped[int]
    max_rank: Mapped[int]
    slots: Mapped[int]
    max_tokens_per_step: Mapped[int]
    chat_template: Mapped[str | None]
    is_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    created_at: Mapped[CreatedAt]


class File(Row):
    __tablename__ = "files"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        CheckConstraint("status in ('processed', 'error')", name="status_known"),
        CheckConstraint("purpose in ('fine-tune', 'fine-tune-results')", name="purpose_known"),
        CheckConstraint("size_bytes >= 0 and num_examples >= 0", name="counts_not_negative"),
        CheckConstraint("length(sha256) = 64", name="sha256_form"),
        Index("ix_files_tenant_id_id_live", "tenant_id", "id", postgresql_where=text("deleted_at is null")),
        Index("ix_files_deleted", "deleted_at", postgresql_where=_UNPURGED),
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
    expires_at: Mapped[dt.datetime | None]
    deleted_at: Mapped[dt.datetime | None]
    purged_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class Upload(Row):
    __tablename__ = "uploads"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        ForeignKeyConstraint(["tenant_id", "file_id"], ["files.tenant_id", "files.id"]),
        CheckConstraint("status in ('pending', 'completed', 'cancelled')", name="status_known"),
        CheckConstraint("(status = 'completed') = (file_id is not null)", name="file_when_completed"),
        CheckConstraint("size_bytes > 0", name="size_positive"),
        Index("ix_uploads_unpurged", "expires_at", postgresql_where=text("purged_at is null")),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    mime_type: Mapped[str]
    size_bytes: Mapped[int]
    file_lifetime_seconds: Mapped[int | None]
    status: Mapped[str] = mapped_column(server_default="pending")
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


class Job(Row):
    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        ForeignKeyConstraint(["tenant_id", "training_file_id"], ["files.tenant_id", "files.id"]),
        ForeignKeyConstraint(["tenant_id", "validation_file_id"], ["files.tenant_id", "files.id"]),
        CheckConstraint(_one_of("status", JobStatus), name="status_known"),
        CheckConstraint("quantization in ('nf4')", name="quantization_known"),
        CheckConstraint(
            "(status = 'running') = (lease_token is not null and lease_until is not null)", name="lease_while_running"
        ),
        CheckConstraint(
            "(status in ('succeeded', 'failed', 'cancelled')) = (finished_at is not null)",
            name="finished_when_terminal",
        ),
        CheckConstraint("(status = 'succeeded') = (fine_tuned_model is not null)", name="model_when_succeeded"),
        CheckConstraint("(status = 'failed') = (error is not null)", name="error_when_failed"),
        CheckConstraint("attempt_count between 0 and max_attempts", name="attempts_bounded"),
        CheckConstraint("length(suffix) between 1 and 64", name="suffix_length"),
        Index(
            "ix_jobs_claimable",
            "pool",
            "tenant_id",
            text("priority desc"),
            "id",
            postgresql_where=text("status = 'queued'"),
        ),
        Index("ix_jobs_unswept", "finished_at", postgresql_where=text("swept_at is null")),
        Index("ix_jobs_running", "tenant_id", "lease_until", postgresql_where=text("status = 'running'")),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"))
    quantization: Mapped[str | None]
    pool: Mapped[str]
    training_file_id: Mapped[uuid.UUID]
    validation_file_id: Mapped[uuid.UUID | None]
    suffix: Mapped[str | None]
    # `metadata` is taken by SQLAlchemy; `job_metadata` maps to the column of that name.
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
    trained_steps: Mapped[int] = mapped_column(server_default="0")
    trained_tokens: Mapped[int | None]
    fine_tuned_model: Mapped[str | None] = mapped_column(unique=True)
    result_file_id: Mapped[uuid.UUID | None]
    error: Mapped[Json | None]
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]
    swept_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class Queue(Row):
    """What a tenant has queued in a pool, and its place in the order of fair share. Triggers keep both."""

    __tablename__ = "queues"
    __table_args__ = (
        CheckConstraint("num_queued >= 0", name="num_queued_not_negative"),
        Index("ix_queues_waiting", "pool", "rank", "tenant_id", postgresql_where=text("num_queued > 0")),
    )
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    pool: Mapped[str] = mapped_column(primary_key=True)
    num_queued: Mapped[int]
    rank: Mapped[float]


class IdempotencyKey(Row):
    __tablename__ = "idempotency_keys"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], ondelete="CASCADE"),
        CheckConstraint("length(key) between 1 and 255", name="key_length"),
        CheckConstraint("length(request_hash) = 32", name="request_hash_length"),
    )
    tenant_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_hash: Mapped[bytes]
    job_id: Mapped[uuid.UUID]
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now(), index=True)


class Attempt(Row):
    __tablename__ = "attempts"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        CheckConstraint(_one_of("outcome", AttemptOutcome), name="outcome_known"),
        CheckConstraint("(outcome is null) = (ended_at is null)", name="outcome_when_ended"),
        Index("ix_attempts_job_id", "job_id"),
        Index("ix_attempts_ended_at", "ended_at"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    number: Mapped[int]
    lease_token: Mapped[int] = mapped_column(unique=True)
    worker_name: Mapped[str]
    entry_charge_seconds: Mapped[float]
    outcome: Mapped[str | None]
    error: Mapped[Json | None]
    started_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[dt.datetime | None]


class Event(Row):
    __tablename__ = "events"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        CheckConstraint("level in ('info', 'warn', 'error')", name="level_known"),
        CheckConstraint("type in ('message', 'metrics')", name="type_known"),
        Index("ix_events_job_id_number", "job_id", "number"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(Identity(always=True), unique=True)
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    details: Mapped[Json | None]
    created_at: Mapped[CreatedAt]


class Metric(Row):
    __tablename__ = "metrics"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),)
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    lease_token: Mapped[int]
    train_loss: Mapped[float]
    train_accuracy: Mapped[float]
    learning_rate: Mapped[float]
    grad_norm: Mapped[float]
    num_tokens: Mapped[int]
    valid_loss: Mapped[float | None]
    valid_accuracy: Mapped[float | None]
    created_at: Mapped[CreatedAt]


class Checkpoint(Row):
    __tablename__ = "checkpoints"
    __table_args__ = (
        UniqueConstraint("job_id", "lease_token", "step"),
        UniqueConstraint("tenant_id", "id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        Index("ix_checkpoints_tenant_id_model_name", "tenant_id", "model_name"),
        Index("ix_checkpoints_deleted", "deleted_at", postgresql_where=_UNPURGED),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    lease_token: Mapped[int]
    step: Mapped[int]
    model_name: Mapped[str]
    object_prefix: Mapped[str]
    files: Mapped[list[Json]]
    metrics: Mapped[Json]
    deleted_at: Mapped[dt.datetime | None]
    purged_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class CheckpointPermission(Row):
    """Lets another tenant, by its wire id or slug, read a checkpoint."""

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


class Adapter(Row):
    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("job_id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        Index("ix_adapters_tenant_id_id", "tenant_id", "id"),
        Index("ix_adapters_deleted", "deleted_at", postgresql_where=_UNPURGED),
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


class Usage(Row):
    __tablename__ = "usage"
    __table_args__ = (
        UniqueConstraint("attempt_id"),
        ForeignKeyConstraint(["tenant_id", "attempt_id"], ["attempts.tenant_id", "attempts.id"]),
        CheckConstraint("gpu_seconds >= 0 and trained_tokens >= 0", name="amounts_not_negative"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    attempt_id: Mapped[uuid.UUID]
    gpu_seconds: Mapped[float]
    trained_tokens: Mapped[int]
    created_at: Mapped[CreatedAt]


class Leader(Row):
    """Who does a duty that one process of the cluster does for all: `name` is the duty."""

    __tablename__ = "leaders"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    lease_until: Mapped[dt.datetime]
