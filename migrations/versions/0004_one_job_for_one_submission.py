"""One job for one submission: idempotency keys, and the hash that identifies a client's retry."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

CURRENT_TENANT = "nullif(current_setting('app.tenant_id', true), '')::uuid"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("request_hash", sa.LargeBinary(), nullable=True))
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("length(key) between 1 and 255", name=op.f("ck_idempotency_keys_key_length")),
        sa.CheckConstraint("length(request_hash) = 32", name=op.f("ck_idempotency_keys_request_hash_length")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"],
            ["jobs.tenant_id", "jobs.id"],
            name=op.f("fk_idempotency_keys_tenant_id_job_id_jobs"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"], unique=False)
    own = f"tenant_id = {CURRENT_TENANT}"
    op.execute("alter table idempotency_keys enable row level security")
    op.execute("alter table idempotency_keys force row level security")
    op.execute(f"create policy tenant_rows on idempotency_keys to espalier_api using ({own}) with check ({own})")
    op.execute("create policy service_rows on idempotency_keys to espalier_schedule using (true)")
    op.execute("grant select, insert, update, delete on idempotency_keys to espalier_api")
    op.execute("grant select, delete on idempotency_keys to espalier_schedule")


def downgrade() -> None:
    op.drop_table("idempotency_keys")
    op.drop_column("jobs", "request_hash")
