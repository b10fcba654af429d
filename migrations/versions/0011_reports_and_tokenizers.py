"""The counts of a file's check, and where the tokenizers of bases are stored."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "files",
        sa.Column(
            "report", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
    )
    op.create_table(
        "base_tokenizers",
        sa.Column("base_model_id", sa.Text(), nullable=False),
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["base_model_id"], ["base_models.id"], name=op.f("fk_base_tokenizers_base_model_id_base_models")
        ),
        sa.PrimaryKeyConstraint("base_model_id", name=op.f("pk_base_tokenizers")),
    )
    op.execute("grant select on base_tokenizers to espalier_api")
    op.execute("grant select, insert, update on base_tokenizers to espalier_worker")


def downgrade() -> None:
    op.drop_table("base_tokenizers")
    op.drop_column("files", "report")
