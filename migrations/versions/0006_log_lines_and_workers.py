"""Log lines of jobs for their tenants, and the workers that are alive."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

CURRENT_TENANT = "nullif(current_setting('app.tenant_id', true), '')::uuid"
GRANTS = """
grant select on log_lines, workers to espalier_api;
grant select, insert on log_lines to espalier_worker;
grant select, insert, update, delete on workers to espalier_worker;
grant select on log_lines to espalier_schedule;
grant select, delete on workers to espalier_schedule;
"""


def upgrade() -> None:
    op.create_table(
        "log_lines",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("attempt_number", sa.BigInteger(), nullable=False),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("details", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("level in ('info', 'warn', 'error')", name=op.f("ck_log_lines_level_known")),
        sa.CheckConstraint("length(name) between 1 and 100", name=op.f("ck_log_lines_name_length")),
        sa.CheckConstraint("octet_length(details::text) <= 4096", name=op.f("ck_log_lines_details_size")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], name=op.f("fk_log_lines_tenant_id_job_id_jobs")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_log_lines")),
        sa.UniqueConstraint("number", name=op.f("uq_log_lines_number")),
    )
    op.create_index("ix_log_lines_job_id_number", "log_lines", ["job_id", "number"], unique=False)
    op.create_table(
        "workers",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("pools", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=True),
        sa.Column("slots", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("slots_in_use", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("alive_until", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("state in ('idle', 'loading', 'serving', 'stopping')", name=op.f("ck_workers_state_known")),
        sa.CheckConstraint("slots_in_use between 0 and slots", name=op.f("ck_workers_slots_bounded")),
        sa.CheckConstraint("pool is not null or slots = 0", name=op.f("ck_workers_slots_of_a_pool")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_workers")),
    )
    own = f"tenant_id = {CURRENT_TENANT}"
    op.execute("alter table log_lines enable row level security")
    op.execute("alter table log_lines force row level security")
    op.execute(f"create policy tenant_rows on log_lines to espalier_api using ({own}) with check ({own})")
    op.execute("create policy service_rows on log_lines to espalier_worker, espalier_schedule using (true)")
    op.execute(GRANTS)


def downgrade() -> None:
    op.drop_table("workers")
    op.drop_index("ix_log_lines_job_id_number", table_name="log_lines")
    op.drop_table("log_lines")
