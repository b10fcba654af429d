"""A job stores the span of its submission as a W3C traceparent, so that the traces of its attempts can link to it."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("traceparent", sa.Text(), nullable=True))
    # The form is not checked: readers ignore what they cannot parse, and a later version of the form is no error.
    op.create_check_constraint(op.f("ck_jobs_traceparent_length"), "jobs", "length(traceparent) <= 100")


def downgrade() -> None:
    op.drop_column("jobs", "traceparent")
