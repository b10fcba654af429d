"""The first schema: tables, row-level security, and what each runtime role may do.

Every tenant-owned table is under FORCE ROW LEVEL SECURITY. The API's role sees the rows of the tenant that its transaction
names (`app.tenant_id`) and, before the tenant is known, the one API key that it names (`app.key_id`). The worker's and the
schedule's roles see every tenant but only the tables and columns they are granted.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


TENANT_TABLES = ("api_keys", "files", "jobs", "attempts", "events", "metrics", "checkpoints", "adapters", "usage")
ROLES = ("espalier_api", "espalier_worker", "espalier_schedule")
CURRENT_TENANT = "nullif(current_setting('app.tenant_id', true), '')::uuid"
CURRENT_KEY = "nullif(current_setting('app.key_id', true), '')"
GRANTS = """
grant select on base_models to espalier_api, espalier_worker, espalier_schedule;
grant select on tenants, api_keys, files, jobs, attempts, events, metrics, checkpoints, adapters, usage to espalier_api;
grant insert on files, jobs, events to espalier_api;
grant update (deleted_at) on files to espalier_api;
grant update (status, lease_token, lease_until, finished_at) on jobs to espalier_api;
grant update (outcome, ended_at) on attempts to espalier_api;
grant usage on sequence lease_tokens to espalier_worker;
grant select on tenants, files, jobs, attempts, events, metrics, checkpoints, adapters, usage to espalier_worker;
grant update (usage, usage_at) on tenants to espalier_worker;
grant update (status, run_after, attempt_count, lease_token, lease_until, trained_steps, trained_tokens, fine_tuned_model,
    result_file_id, error, started_at, finished_at) on jobs to espalier_worker;
grant insert on files, attempts, events, metrics, checkpoints, adapters, usage to espalier_worker;
grant update (outcome, ended_at, error) on attempts to espalier_worker;
grant update (valid_loss, valid_accuracy) on metrics to espalier_worker;
grant delete on metrics, checkpoints to espalier_worker;
grant select on tenants, files, jobs, attempts, events to espalier_schedule;
grant insert on events to espalier_schedule;
grant update (status, run_after, lease_token, lease_until, error, finished_at) on jobs to espalier_schedule;
grant update (outcome, ended_at, error) on attempts to espalier_schedule;
grant update (purged_at) on files to espalier_schedule;
"""


def upgrade() -> None:
    op.execute("create sequence lease_tokens")
    op.create_table(
        "base_models",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("source", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("quantizations", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("target_modules", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("max_seq_len", sa.BigInteger(), nullable=False),
        sa.Column("max_rank", sa.BigInteger(), nullable=False),
        sa.Column("slots", sa.BigInteger(), nullable=False),
        sa.Column("max_tokens_per_step", sa.BigInteger(), nullable=False),
        sa.Column("chat_template", sa.Text(), nullable=True),
        sa.Column("is_enabled", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("cardinality(target_modules) > 0", name=op.f("ck_base_models_has_target_modules")),
        sa.CheckConstraint(
            "max_seq_len >= 8 and max_rank >= 1 and slots >= 1", name=op.f("ck_base_models_limits_positive")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_base_models")),
    )
    op.create_table(
        "tenants",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("slug", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("weight", sa.Double(), server_default="1", nullable=False),
        sa.Column("usage", sa.Double(), server_default="0", nullable=False),
        sa.Column("usage_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("max_running", sa.BigInteger(), server_default="8", nullable=False),
        sa.Column("max_queued", sa.BigInteger(), server_default="1000", nullable=False),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("slug ~ '^[a-z0-9][a-z0-9-]{0,31}$'", name=op.f("ck_tenants_slug_form")),
        sa.CheckConstraint("max_running >= 0 and max_queued >= 0", name=op.f("ck_tenants_quotas_not_negative")),
        sa.CheckConstraint("weight > 0", name=op.f("ck_tenants_weight_positive")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
        sa.UniqueConstraint("slug", name=op.f("uq_tenants_slug")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("length(secret_hash) = 32", name=op.f("ck_api_keys_secret_hash_length")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_api_keys_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("key_id", name=op.f("uq_api_keys_key_id")),
    )
    op.create_index(op.f("ix_api_keys_tenant_id"), "api_keys", ["tenant_id"], unique=False)
    op.create_table(
        "files",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("num_examples", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("status_details", sa.Text(), nullable=True),
        sa.Column(
            "problems", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'::jsonb"), nullable=False
        ),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("purged_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("purpose in ('fine-tune', 'fine-tune-results')", name=op.f("ck_files_purpose_known")),
        sa.CheckConstraint("status in ('processed', 'error')", name=op.f("ck_files_status_known")),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_files_sha256_form")),
        sa.CheckConstraint("size_bytes >= 0 and num_examples >= 0", name=op.f("ck_files_counts_not_negative")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_files_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("uq_files_tenant_id_id")),
    )
    op.create_index(
        "ix_files_deleted",
        "files",
        ["deleted_at"],
        unique=False,
        postgresql_where=sa.text("deleted_at is not null and purged_at is null"),
    )
    op.create_index(
        "ix_files_tenant_id_id_live",
        "files",
        ["tenant_id", "id"],
        unique=False,
        postgresql_where=sa.text("deleted_at is null"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("base_model_id", sa.Text(), nullable=False),
        sa.Column("quantization", sa.Text(), nullable=True),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("training_file_id", sa.Uuid(), nullable=False),
        sa.Column("validation_file_id", sa.Uuid(), nullable=True),
        sa.Column("suffix", sa.Text(), nullable=True),
        sa.Column(
            "metadata", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
        sa.Column("spec", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("total_steps", sa.BigInteger(), nullable=False),
        sa.Column("priority", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("run_after", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("attempt_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("max_attempts", sa.BigInteger(), server_default="3", nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("trained_steps", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=True),
        sa.Column("fine_tuned_model", sa.Text(), nullable=True),
        sa.Column("result_file_id", sa.Uuid(), nullable=True),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("(status = 'failed') = (error is not null)", name=op.f("ck_jobs_error_when_failed")),
        sa.CheckConstraint(
            "(status = 'running') = (lease_token is not null and lease_until is not null)",
            name=op.f("ck_jobs_lease_while_running"),
        ),
        sa.CheckConstraint(
            "(status = 'succeeded') = (fine_tuned_model is not null)", name=op.f("ck_jobs_model_when_succeeded")
        ),
        sa.CheckConstraint(
            "(status in ('succeeded', 'failed', 'cancelled')) = (finished_at is not null)",
            name=op.f("ck_jobs_finished_when_terminal"),
        ),
        sa.CheckConstraint("quantization in ('nf4')", name=op.f("ck_jobs_quantization_known")),
        sa.CheckConstraint(
            "status in ('validating_files', 'queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_jobs_status_known"),
        ),
        sa.CheckConstraint("attempt_count between 0 and max_attempts", name=op.f("ck_jobs_attempts_bounded")),
        sa.CheckConstraint("length(suffix) between 1 and 64", name=op.f("ck_jobs_suffix_length")),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name=op.f("fk_jobs_base_model_id_base_models")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "training_file_id"],
            ["files.tenant_id", "files.id"],
            name=op.f("fk_jobs_tenant_id_training_file_id_files"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "validation_file_id"],
            ["files.tenant_id", "files.id"],
            name=op.f("fk_jobs_tenant_id_validation_file_id_files"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_jobs_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("fine_tuned_model", name=op.f("uq_jobs_fine_tuned_model")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("uq_jobs_tenant_id_id")),
    )
    op.create_index(
        "ix_jobs_claimable",
        "jobs",
        ["pool", "tenant_id", sa.literal_column("priority desc"), "id"],
        unique=False,
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.create_index(
        "ix_jobs_running",
        "jobs",
        ["tenant_id", "lease_until"],
        unique=False,
        postgresql_where=sa.text("status = 'running'"),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("base_model_id", sa.Text(), nullable=False),
        sa.Column("object_prefix", sa.Text(), nullable=False),
        sa.Column("files", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["base_model_id"], ["base_models.id"], name=op.f("fk_adapters_base_model_id_base_models")
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], name=op.f("fk_adapters_tenant_id_job_id_jobs")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("job_id", name=op.f("uq_adapters_job_id")),
        sa.UniqueConstraint("name", name=op.f("uq_adapters_name")),
    )
    op.create_index("ix_adapters_tenant_id_id", "adapters", ["tenant_id", "id"], unique=False)
    op.create_table(
        "attempts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=False),
        sa.Column("worker_name", sa.Text(), nullable=False),
        sa.Column("entry_charge_seconds", sa.Double(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "outcome in ('succeeded', 'failed', 'cancelled', 'preempted', 'lost')",
            name=op.f("ck_attempts_outcome_known"),
        ),
        sa.CheckConstraint("(outcome is null) = (ended_at is null)", name=op.f("ck_attempts_outcome_when_ended")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], name=op.f("fk_attempts_tenant_id_job_id_jobs")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("lease_token", name=op.f("uq_attempts_lease_token")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("uq_attempts_tenant_id_id")),
    )
    op.create_index("ix_attempts_job_id", "attempts", ["job_id"], unique=False)
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("object_prefix", sa.Text(), nullable=False),
        sa.Column("files", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("metrics", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], name=op.f("fk_checkpoints_tenant_id_job_id_jobs")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("job_id", "lease_token", "step", name=op.f("uq_checkpoints_job_id_lease_token_step")),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("details", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("level in ('info', 'warn', 'error')", name=op.f("ck_events_level_known")),
        sa.CheckConstraint("type in ('message', 'metrics')", name=op.f("ck_events_type_known")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], name=op.f("fk_events_tenant_id_job_id_jobs")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sa.UniqueConstraint("number", name=op.f("uq_events_number")),
    )
    op.create_index("ix_events_job_id_number", "events", ["job_id", "number"], unique=False)
    op.create_table(
        "metrics",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=False),
        sa.Column("train_loss", sa.Double(), nullable=False),
        sa.Column("train_accuracy", sa.Double(), nullable=False),
        sa.Column("learning_rate", sa.Double(), nullable=False),
        sa.Column("grad_norm", sa.Double(), nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("valid_loss", sa.Double(), nullable=True),
        sa.Column("valid_accuracy", sa.Double(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], name=op.f("fk_metrics_tenant_id_job_id_jobs")
        ),
        sa.PrimaryKeyConstraint("job_id", "step", name=op.f("pk_metrics")),
    )
    op.create_table(
        "usage",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("attempt_id", sa.Uuid(), nullable=False),
        sa.Column("gpu_seconds", sa.Double(), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("gpu_seconds >= 0 and trained_tokens >= 0", name=op.f("ck_usage_amounts_not_negative")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "attempt_id"],
            ["attempts.tenant_id", "attempts.id"],
            name=op.f("fk_usage_tenant_id_attempt_id_attempts"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage")),
        sa.UniqueConstraint("attempt_id", name=op.f("uq_usage_attempt_id")),
    )
    for role in ROLES:
        # Roles belong to the whole cluster, so another database's migration may have made them already.
        op.execute(f"do $$ begin create role {role} nologin; exception when duplicate_object then null; end $$")
        op.execute(f"grant usage on schema public to {role}")
    for table in ("tenants", *TENANT_TABLES):
        column = "id" if table == "tenants" else "tenant_id"
        own = f"{column} = {CURRENT_TENANT}"
        seen = f"{own} or key_id = {CURRENT_KEY}" if table == "api_keys" else own
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(f"create policy tenant_rows on {table} to espalier_api using ({seen}) with check ({own})")
        op.execute(f"create policy service_rows on {table} to espalier_worker, espalier_schedule using (true)")
    op.execute(GRANTS)


def downgrade() -> None:
    op.drop_table("usage")
    op.drop_table("metrics")
    op.drop_index("ix_events_job_id_number", table_name="events")
    op.drop_table("events")
    op.drop_table("checkpoints")
    op.drop_index("ix_attempts_job_id", table_name="attempts")
    op.drop_table("attempts")
    op.drop_index("ix_adapters_tenant_id_id", table_name="adapters")
    op.drop_table("adapters")
    op.drop_index("ix_jobs_running", table_name="jobs", postgresql_where=sa.text("status = 'running'"))
    op.drop_index("ix_jobs_claimable", table_name="jobs", postgresql_where=sa.text("status = 'queued'"))
    op.drop_table("jobs")
    op.drop_index("ix_files_tenant_id_id_live", table_name="files", postgresql_where=sa.text("deleted_at is null"))
    op.drop_index(
        "ix_files_deleted", table_name="files", postgresql_where=sa.text("deleted_at is not null and purged_at is null")
    )
    op.drop_table("files")
    op.drop_index(op.f("ix_api_keys_tenant_id"), table_name="api_keys")
    op.drop_table("api_keys")
    op.drop_table("tenants")
    op.drop_table("base_models")
    op.execute("drop sequence lease_tokens")
