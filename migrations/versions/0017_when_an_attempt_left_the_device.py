"""When an attempt left the device, as its trainer reports."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("left_device_at", sa.DateTime(timezone=True), nullable=True))
    op.execute("grant update (left_device_at) on attempts to espalier_worker")


def downgrade() -> None:
    op.drop_column("attempts", "left_device_at")
