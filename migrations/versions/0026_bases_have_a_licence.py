"""A base has the licence of its weights, which an adapter's card repeats. Roles that may read a base may read it."""

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("base_models", sa.Column("license", sa.Text(), nullable=True))
    op.create_check_constraint(
        op.f("ck_base_models_license_is_a_name"), "base_models", "char_length(license) between 1 and 128"
    )


def downgrade() -> None:
    op.drop_constraint(op.f("ck_base_models_license_is_a_name"), "base_models")
    op.drop_column("base_models", "license")
