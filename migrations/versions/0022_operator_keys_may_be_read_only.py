"""An operator key may be read-only. Existing keys keep all of their rights.

No grant is needed: the operator's role inserts and reads whole rows. It may update two columns, and this is none of
them, so a read-only key cannot be changed into another.
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
