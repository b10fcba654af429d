"""A status for uploads that are being completed. It lasts until the completion ends or its lease is over."""

import sqlalchemy as sa
from alembic import op

from migrations.forced import unforced

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_STATUS = op.f("ck_uploads_status_known")
_LEASE = op.f("ck_uploads_completing_until_while_completing")


def upgrade() -> None:
    op.add_column("uploads", sa.Column("completing_until", sa.DateTime(timezone=True), nullable=True))
    op.drop_constraint(_STATUS, "uploads")
    op.create_check_constraint(_STATUS, "uploads", "status in ('pending', 'completing', 'completed', 'cancelled')")
    op.create_check_constraint(_LEASE, "uploads", "(status = 'completing') = (completing_until is not null)")
    op.execute("grant update (completing_until, expires_at) on uploads to espalier_api")


def downgrade() -> None:
    with unforced():
        op.execute("update uploads set status = 'pending', completing_until = null where status = 'completing'")
    op.execute("revoke update (completing_until, expires_at) on uploads from espalier_api")
    op.drop_constraint(_LEASE, "uploads")
    op.drop_constraint(_STATUS, "uploads")
    op.create_check_constraint(_STATUS, "uploads", "status in ('pending', 'completed', 'cancelled')")
    op.drop_column("uploads", "completing_until")
