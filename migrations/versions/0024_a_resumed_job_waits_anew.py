"""The wait of a resumed job counts from its resumption: the API moves `run_after`, from which waiting is counted."""

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("grant update (run_after) on jobs to espalier_api")


def downgrade() -> None:
    op.execute("revoke update (run_after) on jobs from espalier_api")
