"""API keys say what they may do and when they were last used, and a tenant's own administrators manage them."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

CURRENT_KEY = "nullif(current_setting('app.key_id', true), '')"


def upgrade() -> None:
    # A key made before there were scopes keeps its rights, and does not get the right to make keys.
    op.add_column(
        "api_keys",
        sa.Column("scopes", sa.ARRAY(sa.Text()), nullable=False, server_default=sa.text("'{read,submit,download}'")),
    )
    op.alter_column("api_keys", "scopes", server_default=None)
    op.add_column("api_keys", sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True))
    op.create_check_constraint(
        op.f("ck_api_keys_scopes_known"),
        "api_keys",
        "scopes <@ array['read', 'submit', 'download', 'admin'] and scopes <> '{}'",
    )
    op.create_check_constraint(op.f("ck_api_keys_name_length"), "api_keys", "length(name) between 1 and 64")
    op.execute("grant insert, update (revoked_at, last_used_at) on api_keys to espalier_api")
    # A key's use is noted before its tenant is known.
    op.execute(
        f"create policy own_key on api_keys for update to espalier_api using (key_id = {CURRENT_KEY})"
        f" with check (key_id = {CURRENT_KEY})"
    )


def downgrade() -> None:
    op.execute("drop policy own_key on api_keys")
    op.execute("revoke insert, update (revoked_at, last_used_at) on api_keys from espalier_api")
    op.drop_constraint(op.f("ck_api_keys_name_length"), "api_keys")
    op.drop_constraint(op.f("ck_api_keys_scopes_known"), "api_keys")
    op.drop_column("api_keys", "last_used_at")
    op.drop_column("api_keys", "scopes")
