"""When a job's prefix was swept of objects that no row names, and what the schedule may read and book for that."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("swept_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_jobs_unswept", "jobs", ["finished_at"], postgresql_where=sa.text("swept_at is null"))
    op.create_index("ix_attempts_ended_at", "attempts", ["ended_at"])
    op.execute("grant update (swept_at) on jobs to espalier_schedule")
    op.execute("grant select on checkpoints, adapters, usage to espalier_schedule")
    op.execute("grant insert on usage to espalier_schedule")
    op.execute("grant update (usage, usage_at) on tenants to espalier_schedule")


def downgrade() -> None:
    op.execute("revoke update (usage, usage_at) on tenants from espalier_schedule")
    op.execute("revoke insert, select on usage from espalier_schedule")
    op.drop_index("ix_attempts_ended_at", table_name="attempts")
    op.drop_index("ix_jobs_unswept", table_name="jobs", postgresql_where=sa.text("swept_at is null"))
    op.drop_column("jobs", "swept_at")
