"""Workers have identities, report how far their clock is off, and uncounted attempts are counted.

Since this version the key of a worker's row is its identity, and `given_name` is its display name; two processes may
share the latter. Workers of the previous version still use their display name as key, and leave `given_name` empty.
"""

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("given_name", sa.Text()))
    op.add_column("workers", sa.Column("clock_offset_seconds", sa.Double()))
    op.add_column("workers", sa.Column("is_clock_wrong", sa.Boolean(), server_default="false", nullable=False))
    op.add_column("jobs", sa.Column("num_uncounted", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("furthest_step", sa.BigInteger(), server_default="0", nullable=False))
    op.execute("grant update (num_uncounted, furthest_step) on jobs to espalier_worker")


def downgrade() -> None:
    op.drop_column("jobs", "furthest_step")
    op.drop_column("jobs", "num_uncounted")
    op.drop_column("workers", "is_clock_wrong")
    op.drop_column("workers", "clock_offset_seconds")
    op.drop_column("workers", "given_name")
