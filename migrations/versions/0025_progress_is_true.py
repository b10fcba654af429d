"""Progress counts the steps that a job really takes, and the job stores what became of its rows.

The worker corrects `total_steps` once it has read the files. A skipped step has no numbers in `metrics`, so the pace of
running jobs is measured by steps, not by rows of numbers.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

ROLE = "espalier_outlook"
SIGNATURE = "queue_outlook(text, uuid, float8, float8, float8, bigint)"
# The other lines of the function are unchanged.
OUTLOOK = """
do $$ begin
    execute replace(pg_get_functiondef('{signature}'::regprocedure), '{old}', '{new}');
end $$
"""
BY_ROWS = "nullif(count(*) - 1, 0)"
BY_STEPS = "nullif(max(x.step) - min(x.step), 0)"


def _replace_outlook(old: str, new: str) -> None:
    op.execute(f"grant create on schema public to {ROLE}")
    op.execute(OUTLOOK.format(signature=SIGNATURE, old=old, new=new))
    op.execute(f"revoke create on schema public from {ROLE}")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("skipped_steps", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("datasets", postgresql.JSONB(astext_type=sa.Text())))
    op.create_check_constraint(op.f("ck_jobs_skipped_steps_not_negative"), "jobs", "skipped_steps >= 0")
    op.execute("grant update (total_steps, skipped_steps, datasets) on jobs to espalier_worker")
    _replace_outlook(BY_ROWS, BY_STEPS)


def downgrade() -> None:
    _replace_outlook(BY_STEPS, BY_ROWS)
    op.execute("revoke update (total_steps) on jobs from espalier_worker")
    op.drop_constraint(op.f("ck_jobs_skipped_steps_not_negative"), "jobs", type_="check")
    op.drop_column("jobs", "datasets")
    op.drop_column("jobs", "skipped_steps")
