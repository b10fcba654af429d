"""An operator key may be read-only. Keys from before may do everything, as they always could.

No grant is needed: the operator's role inserts and reads whole rows. It updates two named columns, and this is none of
them, so a key that may only read cannot be made into one that may do more.
"""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "operator_keys", sa.Column("is_read_only", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )


def downgrade() -> None:
    op.drop_column("operator_keys", "is_read_only")
