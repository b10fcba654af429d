"""Resume points, pause, and jobs that are tried alone after a shared crash."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.forced import unforced

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

CURRENT_TENANT = "nullif(current_setting('app.tenant_id', true), '')::uuid"
OUTCOMES = "'succeeded', 'failed', 'cancelled', 'preempted', 'lost'"
GRANTS = """
grant select, insert, delete on resume_points to espalier_worker;
grant select, delete on resume_points to espalier_schedule;
grant update (pause_requested_at) on jobs to espalier_api, espalier_worker, espalier_schedule;
grant update (suspect_step, num_suspicions) on jobs to espalier_worker;
"""


def upgrade() -> None:
    op.create_table(
        "resume_points",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("object_prefix", sa.Text(), nullable=False),
        sa.Column("files", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("step > 0", name=op.f("ck_resume_points_step_positive")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], name=op.f("fk_resume_points_tenant_id_job_id_jobs")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_resume_points")),
        sa.UniqueConstraint("job_id", "lease_token", "step", name=op.f("uq_resume_points_job_id_lease_token_step")),
    )
    op.execute("alter table resume_points enable row level security")
    op.execute("alter table resume_points force row level security")
    own = f"tenant_id = {CURRENT_TENANT}"
    op.execute(f"create policy tenant_rows on resume_points to espalier_api using ({own}) with check ({own})")
    op.execute("create policy service_rows on resume_points to espalier_worker, espalier_schedule using (true)")
    op.add_column("jobs", sa.Column("pause_requested_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("suspect_step", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("num_suspicions", sa.BigInteger(), server_default="0", nullable=False))
    op.create_check_constraint(
        op.f("ck_jobs_pause_requested_while_running"), "jobs", "pause_requested_at is null or status = 'running'"
    )
    op.create_index(
        "ix_jobs_suspect",
        "jobs",
        ["pool", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'queued' and suspect_step is not null"),
    )
    op.drop_constraint(op.f("ck_attempts_outcome_known"), "attempts")
    op.create_check_constraint(
        op.f("ck_attempts_outcome_known"),
        "attempts",
        "outcome in ('succeeded', 'failed', 'cancelled', 'preempted', 'paused', 'lost')",
    )
    op.execute(GRANTS)


def downgrade() -> None:
    with unforced():
        op.execute("update attempts set outcome = 'preempted' where outcome = 'paused'")
    op.drop_constraint(op.f("ck_attempts_outcome_known"), "attempts")
    op.create_check_constraint(op.f("ck_attempts_outcome_known"), "attempts", f"outcome in ({OUTCOMES})")
    op.drop_index("ix_jobs_suspect", table_name="jobs")
    op.drop_constraint(op.f("ck_jobs_pause_requested_while_running"), "jobs")
    op.drop_column("jobs", "num_suspicions")
    op.drop_column("jobs", "suspect_step")
    op.drop_column("jobs", "pause_requested_at")
    op.drop_table("resume_points")
