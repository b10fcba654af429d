"""The tables. Every tenant-owned row carries `tenant_id`, and composite keys keep references inside one tenant.

What SQL can promise, SQL promises: legal statuses, a lease exactly while running, one adapter a job, one usage row an
attempt, numbers within their bounds. Row-level security on every tenant-owned table stands in the migrations.
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
from core.domain import bounds
from core.domain.api_keys import Scope
from core.domain.bases import BaseState
from core.domain.bounds import Bounds
from core.domain.duties import Duty
from core.domain.jobs import MAX_ATTEMPTS, AttemptOutcome, JobStatus

LEASE_TOKENS = Sequence("lease_tokens", metadata=Row.metadata)
_NOT_RUNNING = text("status <> 'running'")
_UNPURGED = text("deleted_at is not null and purged_at is null")


def _one_of(column: str, values: type[StrEnum]) -> str:
    return f"{column} in ({_quoted(values)})"


def _bounded(column: str, limits: Bounds) -> CheckConstraint:
    return CheckConstraint(limits.check(column), name=f"{column}_bounded")


def _quoted(values: type[StrEnum]) -> str:
    return ", ".join(repr(str(value)) for value in values)


class Tenant(Row):
    __tablename__ = "tenants"
    __table_args__ = (
        CheckConstraint("slug ~ '^[a-z0-9][a-z0-9-]{0,31}$'", name="slug_form"),
        _bounded("weight", bounds.WEIGHT),
        _bounded("usage", bounds.USAGE_SECONDS),
        _bounded("max_running", bounds.RUNNING_JOBS),
        _bounded("max_queued", bounds.QUEUED_JOBS),
        _bounded("max_storage_bytes", bounds.STORED_BYTES),
        _bounded("max_tokens_per_job", bounds.TRAINED_TOKENS),
        _bounded("max_gpu_seconds_per_month", bounds.GPU_SECONDS),
        _bounded("requests_per_minute", bounds.REQUESTS_PER_MINUTE),
        CheckConstraint("isfinite(usage_at)", name="usage_at_finite"),
        CheckConstraint("lift between -1e12 and 1e12", name="lift_bounded"),
        CheckConstraint("deleted_at is null or disabled_at is not null", name="disabled_when_deleted"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    weight: Mapped[float] = mapped_column(server_default="1")
    # GPU-seconds, decayed up to `usage_at`. `lift` decays with it; the sum is the tenant's account in fair share.
    usage: Mapped[float] = mapped_column(server_default="0")
    lift: Mapped[float] = mapped_column(server_default="0")
    usage_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    max_running: Mapped[int] = mapped_column(server_default="8")
    max_queued: Mapped[int] = mapped_column(server_default="1000")
    # Where these are null there is no limit, and where the list is null every base is allowed.
    max_storage_bytes: Mapped[int | None]
    max_tokens_per_job: Mapped[int | None]
    max_gpu_seconds_per_month: Mapped[float | None]
    requests_per_minute: Mapped[int | None]
    allowed_base_models: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    disabled_at: Mapped[dt.datetime | None]
    # Since when it is being erased, for ever, and when nothing was left of it but this row and its bookings.
    deleted_at: Mapped[dt.datetime | None]
    erased_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class ApiKeyRow(Row):
    __tablename__ = "api_keys"
    __table_args__ = (
        CheckConstraint("length(secret_hash) = 32", name="secret_hash_length"),
        CheckConstraint(f"scopes <@ array[{_quoted(Scope)}] and scopes <> '{{}}'", name="scopes_known"),
        CheckConstraint("length(name) between 1 and 64", name="name_length"),
        UniqueConstraint("tenant_id", "key_id"),
        ForeignKeyConstraint(["tenant_id", "created_by"], ["api_keys.tenant_id", "api_keys.key_id"]),
        Index("ix_api_keys_created_by", "created_by"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), index=True)
    key_id: Mapped[str] = mapped_column(unique=True)
    secret_hash: Mapped[bytes]
    name: Mapped[str]
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    created_by: Mapped[str | None]  # the key that made this one; null where it was an operator
    expires_at: Mapped[dt.datetime | None]
    last_used_at: Mapped[dt.datetime | None]
    revoked_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class OperatorKeyRow(Row):
    __tablename__ = "operator_keys"
    __table_args__ = (
        CheckConstraint("length(secret_hash) = 32", name="secret_hash_length"),
        CheckConstraint("length(name) between 1 and 64", name="name_length"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(unique=True)
    secret_hash: Mapped[bytes]
    name: Mapped[str]
    is_read_only: Mapped[bool] = mapped_column(server_default=text("false"))
    expires_at: Mapped[dt.datetime | None]
    last_used_at: Mapped[dt.datetime | None]
    revoked_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class AuditEntry(Row):
    """One change, written by a trigger in the change's own transaction; no runtime role may write here."""

    __tablename__ = "audit_entries"
    __table_args__ = (
        Index("ix_audit_entries_tenant_id_number", "tenant_id", "number"),
        Index("ix_audit_entries_subject", "subject"),
        Index(
            "ix_audit_entries_project_id",
            text("coalesce(after ->> 'project_id', before ->> 'project_id')"),
            postgresql_where=text("starts_with(action, 'checkpoint_permission.')"),
        ),
    )
    number: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    tenant_id: Mapped[uuid.UUID | None]
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    before: Mapped[Json]
    after: Mapped[Json]
    created_at: Mapped[CreatedAt]


class BaseModelRow(Row):
    __tablename__ = "base_models"
    __table_args__ = (
        _bounded("max_seq_len", bounds.SEQ_LEN),
        _bounded("max_rank", bounds.RANK),
        _bounded("slots", bounds.SLOTS),
        _bounded("max_tokens_per_step", bounds.TOKENS_PER_STEP),
        CheckConstraint("cardinality(target_modules) > 0", name="has_target_modules"),
        CheckConstraint(_one_of("state", BaseState), name="state_known"),
        CheckConstraint("(state = 'unusable') = (state_reason is not null)", name="reason_when_unusable"),
        CheckConstraint("char_length(license) between 1 and 128", name="license_is_a_name"),
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
    # What its weights are licensed under; null where nobody has said.
    license: Mapped[str | None]
    # In the registry or not; `disabled_at` is the operator's own switch, which the registry does not move.
    is_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    # By `base-models add`: a registry file that does not name it leaves it alone.
    is_registered_by_hand: Mapped[bool] = mapped_column(server_default=text("false"))
    disabled_at: Mapped[dt.datetime | None]
    # What the last worker or operator that loaded it found; the reason is in an operator's words and for operators.
    state: Mapped[str] = mapped_column(server_default=BaseState.UNCHECKED)
    state_reason: Mapped[str | None]
    state_since: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    checked_by: Mapped[str | None]
    created_at: Mapped[CreatedAt]


class BaseTokenizerRow(Row):
    """Where the tokenizer of a base is stored, by the worker that loaded it last."""

    __tablename__ = "base_tokenizers"
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"), primary_key=True)
    object_key: Mapped[str]
    published_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())


class File(Row):
    __tablename__ = "files"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        CheckConstraint("status in ('processed', 'error')", name="status_known"),
        CheckConstraint("purpose in ('fine-tune', 'fine-tune-results')", name="purpose_known"),
        CheckConstraint("size_bytes >= 0 and num_examples >= 0", name="counts_not_negative"),
        CheckConstraint("length(sha256) = 64", name="sha256_form"),
        Index("ix_files_tenant_id_id_live", "tenant_id", "id", postgresql_where=text("deleted_at is null")),
        Index("ix_files_unpurged", "tenant_id", postgresql_where=_UNPURGED),
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
        _bounded("size_bytes", bounds.UPLOAD_BYTES),
        _bounded("file_lifetime_seconds", bounds.FILE_SECONDS),
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


class Job(Row):
    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        UniqueConstraint("tenant_id", "name_digits"),
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
        _bounded("priority", bounds.PRIORITY),
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
    # The end of its model's name. A tenant has each once, so that a name is free when its adapter is ready.
    name_digits: Mapped[str] = mapped_column(server_default=text("right(gen_random_uuid()::text, 8)"))
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
    pause_requested_at: Mapped[dt.datetime | None]
    # The step it had reached when its trainer died with others in it; until it is acquitted it runs alone.
    suspect_step: Mapped[int | None]
    num_suspicions: Mapped[int] = mapped_column(server_default="0")
    # Attempts in a row that were not counted and came to no step beyond the furthest of any attempt.
    num_uncounted: Mapped[int] = mapped_column(server_default="0")
    furthest_step: Mapped[int] = mapped_column(server_default="0")
    trained_steps: Mapped[int] = mapped_column(server_default="0")
    # Those of the trained steps that changed nothing, because their gradient was not finite.
    skipped_steps: Mapped[int] = mapped_column(server_default="0")
    # What became of the rows of its files, once an attempt has read them.
    datasets: Mapped[Json | None]
    trained_tokens: Mapped[int | None]
    fine_tuned_model: Mapped[str | None] = mapped_column(unique=True)
    result_file_id: Mapped[uuid.UUID | None]
    error: Mapped[Json | None]
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]
    swept_at: Mapped[dt.datetime | None]
    # By its tenant. The row waits, without what names anything once it is blanked, until nothing late can be written.
    deleted_at: Mapped[dt.datetime | None]
    blanked_at: Mapped[dt.datetime | None]
    # The span of its submission, in W3C's words, where there are traces.
    traceparent: Mapped[str | None]
    created_at: Mapped[CreatedAt]


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


class Queue(Row):
    """What of a tenant waits in a pool, and its place in the order of fair share. Triggers keep all three.

    `num_paused` counts jobs that are paused, and running ones that are about to be.
    """

    __tablename__ = "queues"
    __table_args__ = (
        CheckConstraint("num_queued >= 0", name="num_queued_not_negative"),
        CheckConstraint("num_paused >= 0", name="num_paused_not_negative"),
        Index("ix_queues_waiting", "pool", "rank", "tenant_id", postgresql_where=text("num_queued > 0")),
        Index("ix_queues_new", "tenant_id", postgresql_where=text("is_new")),
    )
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    pool: Mapped[str] = mapped_column(primary_key=True)
    num_queued: Mapped[int]
    num_paused: Mapped[int] = mapped_column(server_default="0")
    rank: Mapped[float]
    # A submission found it empty, and the tenant's account is still to be made level.
    is_new: Mapped[bool] = mapped_column(server_default=text("false"))


class Pool(Row):
    """What was measured of a pool: the GPU-seconds that a step of one job uses, the seconds that its base loads."""

    __tablename__ = "pools"
    __table_args__ = (CheckConstraint("step_seconds >= 0 and load_seconds >= 0", name="seconds_not_negative"),)
    name: Mapped[str] = mapped_column(primary_key=True)
    step_seconds: Mapped[float | None]
    load_seconds: Mapped[float | None]


class StorageTotal(Row):
    """The bytes of all of a tenant's rows whose objects are not gone. Triggers keep it."""

    __tablename__ = "storage_totals"
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    num_bytes: Mapped[int]


class SetAside(Row):
    """A row that a duty could not do. The duty leaves it alone until `retry_at`."""

    __tablename__ = "set_asides"
    __table_args__ = (
        CheckConstraint(_one_of("duty", Duty), name="duty_known"),
        Index("ix_set_asides_tenant_id", "tenant_id"),
    )
    duty: Mapped[str] = mapped_column(primary_key=True)
    row_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    reason: Mapped[str]
    num_failures: Mapped[int] = mapped_column(server_default="1")
    retry_at: Mapped[dt.datetime]
    created_at: Mapped[CreatedAt]


class Attempt(Row):
    __tablename__ = "attempts"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        CheckConstraint(_one_of("outcome", AttemptOutcome), name="outcome_known"),
        CheckConstraint("(outcome is null) = (ended_at is null)", name="outcome_when_ended"),
        Index("ix_attempts_job_id", "job_id"),
        Index("ix_attempts_ended_at", "ended_at"),
        Index("ix_attempts_open", "tenant_id", postgresql_where=text("outcome is null")),
        Index("ix_attempts_succeeded", "ended_at", postgresql_where=text("outcome = 'succeeded'")),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    number: Mapped[int]
    lease_token: Mapped[int] = mapped_column(unique=True)
    worker_name: Mapped[str]
    # Charged at the claim. What the attempt has used since counts instead, once it is more.
    entry_charge_seconds: Mapped[float]
    used_seconds: Mapped[float] = mapped_column(server_default="0")
    # Since when it steps in its slot, and since when it is giving that slot to another tenant.
    stepping_at: Mapped[dt.datetime | None]
    lending_at: Mapped[dt.datetime | None]
    outcome: Mapped[str | None]
    error: Mapped[Json | None]
    started_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[dt.datetime | None]
    left_device_at: Mapped[dt.datetime | None]


class Event(Row):
    __tablename__ = "events"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        CheckConstraint("level in ('info', 'warn', 'error')", name="level_known"),
        CheckConstraint("type in ('message', 'metrics')", name="type_known"),
        Index("ix_events_job_id_number", "job_id", "number"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # No index over it alone: the planner would take it for a job's newest rows, and walk everybody's.
    number: Mapped[int] = mapped_column(Identity(always=True))
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    details: Mapped[Json | None]
    created_at: Mapped[CreatedAt]


class LogLine(Row):
    """A line that a worker wrote about one job: a name and numbers, never a row's words."""

    __tablename__ = "log_lines"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        CheckConstraint("level in ('info', 'warn', 'error')", name="level_known"),
        CheckConstraint("length(name) between 1 and 100", name="name_length"),
        CheckConstraint("octet_length(details::text) <= 4096", name="details_size"),
        Index("ix_log_lines_job_id_number", "job_id", "number"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # No index over it alone: the planner would take it for a job's newest rows, and walk everybody's.
    number: Mapped[int] = mapped_column(Identity(always=True))
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    attempt_number: Mapped[int]
    level: Mapped[str]
    name: Mapped[str]
    details: Mapped[Json]
    created_at: Mapped[CreatedAt]


class Worker(Row):
    """A supervisor, as it said of itself at its last heartbeat. It counts as alive until `alive_until`.

    `name` is its identity, and `given_name` what it is called, which several may share. A worker of a version before
    0028 has only the one name. `clock_offset_seconds` is how far its clock is ahead of the database's.
    """

    __tablename__ = "workers"
    __table_args__ = (
        CheckConstraint("state in ('idle', 'loading', 'serving', 'stopping')", name="state_known"),
        CheckConstraint("slots_in_use between 0 and slots", name="slots_bounded"),
        CheckConstraint("pool is not null or slots = 0", name="slots_of_a_pool"),
    )
    name: Mapped[str] = mapped_column(primary_key=True)
    given_name: Mapped[str | None]
    pools: Mapped[list[str]] = mapped_column(ARRAY(Text))
    state: Mapped[str]
    pool: Mapped[str | None]
    slots: Mapped[int] = mapped_column(server_default="0")
    slots_in_use: Mapped[int] = mapped_column(server_default="0")
    # Since when it holds that base, and the pool whose base it is about to load instead.
    pool_since: Mapped[dt.datetime | None]
    next_pool: Mapped[str | None]
    # Why it cannot load the bases of some of its pools, by pool: for operators.
    refusals: Mapped[Json] = mapped_column(server_default=text("'{}'::jsonb"))
    started_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    heartbeat_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    alive_until: Mapped[dt.datetime]
    version: Mapped[str | None]
    clock_offset_seconds: Mapped[float | None]
    is_clock_wrong: Mapped[bool] = mapped_column(server_default=text("false"))


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


class MetricBlock(Row):
    """What a chart needs to know of 32 steps of a job, of which `last_step`, a multiple of 32, is the last.

    A trigger adds it with that step; where the step was skipped there is none. Of steps with the same loss it names
    the last.
    """

    __tablename__ = "metric_blocks"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], ondelete="CASCADE"),)
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    last_step: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    num_steps: Mapped[int]
    least_loss: Mapped[float]
    least_step: Mapped[int]
    greatest_loss: Mapped[float]
    greatest_step: Mapped[int]
    evaluated_step: Mapped[int | None]


class Checkpoint(Row):
    __tablename__ = "checkpoints"
    __table_args__ = (
        UniqueConstraint("job_id", "step"),
        UniqueConstraint("tenant_id", "id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        Index("ix_checkpoints_tenant_id_model_name", "tenant_id", "model_name"),
        CheckConstraint("size_bytes >= 0", name="size_not_negative"),
        Index("ix_checkpoints_unpurged", "tenant_id", postgresql_where=_UNPURGED),
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


class ResumePoint(Row):
    """A slot's stored state, from which the job's next attempt goes on."""

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


class Adapter(Row):
    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("job_id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        Index("ix_adapters_tenant_id_id", "tenant_id", "id"),
        CheckConstraint("size_bytes >= 0", name="size_not_negative"),
        Index("ix_adapters_unpurged", "tenant_id", postgresql_where=_UNPURGED),
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
    """A booking, which outlives its attempt: `job_id` and `pool` are set when that goes."""

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
        _bounded("gpu_seconds", bounds.GPU_SECONDS),
        _bounded("trained_tokens", bounds.TRAINED_TOKENS),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    attempt_id: Mapped[uuid.UUID | None]
    job_id: Mapped[uuid.UUID | None]
    pool: Mapped[str | None]
    gpu_seconds: Mapped[float]
    trained_tokens: Mapped[int]
    created_at: Mapped[CreatedAt]


class RetentionMark(Row):
    """How far the deletion of a kind of rows has come: up to this job, in the order in which jobs end."""

    __tablename__ = "retention_marks"
    kind: Mapped[str] = mapped_column(primary_key=True)
    finished_at: Mapped[dt.datetime]
    job_id: Mapped[uuid.UUID]


class Leader(Row):
    """Who does a duty that one process of the cluster does for all: `name` is the duty."""

    __tablename__ = "leaders"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    lease_until: Mapped[dt.datetime]
