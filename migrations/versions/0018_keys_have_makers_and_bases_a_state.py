"""Keys record which key made them, operators' keys may expire, and bases are usable, unusable or unchecked."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

STATE = "state, state_reason, state_since, checked_by"
GRANTS = f"""
grant update ({STATE}) on base_models to espalier_worker;
grant select on workers to espalier_operator;
create policy checked_rows on base_models for update to espalier_worker using (true) with check (true);
"""


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("created_by", sa.Text(), nullable=True))
    op.create_index("ix_api_keys_created_by", "api_keys", ["created_by"])
    op.create_unique_constraint(op.f("uq_api_keys_tenant_id_key_id"), "api_keys", ["tenant_id", "key_id"])
    op.create_foreign_key(
        op.f("fk_api_keys_tenant_id_created_by_api_keys"),
        "api_keys",
        "api_keys",
        ["tenant_id", "created_by"],
        ["tenant_id", "key_id"],
    )
    op.add_column("operator_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("base_models", sa.Column("state", sa.Text(), server_default="unchecked", nullable=False))
    op.add_column("base_models", sa.Column("state_reason", sa.Text(), nullable=True))
    op.add_column(
        "base_models",
        sa.Column("state_since", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
    )
    op.add_column("base_models", sa.Column("checked_by", sa.Text(), nullable=True))
    op.add_column(
        "base_models",
        sa.Column("is_registered_by_hand", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    op.create_check_constraint(
        op.f("ck_base_models_state_known"), "base_models", "state in ('unchecked', 'usable', 'unusable')"
    )
    op.create_check_constraint(
        op.f("ck_base_models_reason_when_unusable"), "base_models", "(state = 'unusable') = (state_reason is not null)"
    )
    op.add_column(
        "workers",
        sa.Column(
            "refusals", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
    )
    op.execute(GRANTS)


def downgrade() -> None:
    op.execute("drop policy checked_rows on base_models")
    op.execute("revoke select on workers from espalier_operator")
    op.execute(f"revoke update ({STATE}) on base_models from espalier_worker")
    op.drop_column("workers", "refusals")
    op.drop_constraint(op.f("ck_base_models_reason_when_unusable"), "base_models")
    op.drop_constraint(op.f("ck_base_models_state_known"), "base_models")
    for column in ("is_registered_by_hand", "checked_by", "state_since", "state_reason", "state"):
        op.drop_column("base_models", column)
    op.drop_column("operator_keys", "expires_at")
    op.drop_constraint(op.f("fk_api_keys_tenant_id_created_by_api_keys"), "api_keys")
    op.drop_constraint(op.f("uq_api_keys_tenant_id_key_id"), "api_keys")
    op.drop_index("ix_api_keys_created_by", table_name="api_keys")
    op.drop_column("api_keys", "created_by")
