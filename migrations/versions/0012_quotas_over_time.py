"""A tenant's GPU-seconds of the month decide whether its jobs may be claimed, and an index counts its queued jobs.

The audit log also records what people do to checkpoints, to their permissions, and to uploads.
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


RECORDED = {
    "checkpoints": ("when (current_user not in ('espalier_worker', 'espalier_schedule'))", "'checkpoint', 'id'"),
    "uploads": ("when (current_user not in ('espalier_worker', 'espalier_schedule'))", "'upload', 'id'"),
    "checkpoint_permissions": ("", "'checkpoint_permission', 'id'"),
}


def upgrade() -> None:
    op.create_index("ix_usage_tenant_id_created_at", "usage", ["tenant_id", "created_at"])
    op.create_index(
        "ix_jobs_waiting", "jobs", ["tenant_id"], postgresql_where=sa.text("status in ('validating_files', 'queued')")
    )
    op.execute("""
        create function within_gpu_quota(tenant uuid, quota double precision) returns boolean language sql stable as $$
            select quota is null or quota > (
                select coalesce(sum(u.gpu_seconds), 0) from usage u
                where u.tenant_id = tenant and u.created_at >= date_trunc('month', now(), 'UTC'))
        $$
    """)
    for table, (condition, arguments) in RECORDED.items():
        op.execute(
            f"create trigger record_change after insert or update or delete on {table} for each row {condition} "
            f"execute function record_change({arguments})"
        )


def downgrade() -> None:
    for table in RECORDED:
        op.execute(f"drop trigger record_change on {table}")
    op.execute("drop function within_gpu_quota(uuid, double precision)")
    op.drop_index("ix_jobs_waiting", table_name="jobs")
    op.drop_index("ix_usage_tenant_id_created_at", table_name="usage")
