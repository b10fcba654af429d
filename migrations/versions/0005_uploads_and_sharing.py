"""Uploads in parts, files that expire, models that can be deleted, checkpoints shared with other tenants."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

CURRENT_TENANT = "nullif(current_setting('app.tenant_id', true), '')::uuid"
# A tenant is named by its wire id or its slug.
CURRENT_NAMES = (
    "'org-' || replace(nullif(current_setting('app.tenant_id', true), ''), '-', ''),"
    f" (select slug from tenants where id = {CURRENT_TENANT})"
)
OWN = f"tenant_id = {CURRENT_TENANT}"
SHARED = "id in (select checkpoint_id from checkpoint_permissions)"
UNPURGED = sa.text("deleted_at is not null and purged_at is null")
GRANTS = """
grant select, insert on uploads, upload_parts to espalier_api;
grant update (status, file_id) on uploads to espalier_api;
grant select, insert, delete on checkpoint_permissions to espalier_api;
grant update (deleted_at) on adapters, checkpoints to espalier_api;
grant select on uploads, adapters, checkpoints to espalier_schedule;
grant update (purged_at) on uploads, adapters, checkpoints to espalier_schedule;
grant update (deleted_at) on files to espalier_schedule;
"""


def created_at() -> "sa.Column[object]":
    return sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False)


def upgrade() -> None:
    op.add_column("files", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "ix_files_expires_at",
        "files",
        ["expires_at"],
        postgresql_where=sa.text("deleted_at is null and expires_at is not null"),
    )
    for table in ("adapters", "checkpoints"):
        op.add_column(table, sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
        op.add_column(table, sa.Column("purged_at", sa.DateTime(timezone=True), nullable=True))
        op.create_index(f"ix_{table}_deleted", table, ["deleted_at"], postgresql_where=UNPURGED)
    op.create_unique_constraint(op.f("uq_checkpoints_tenant_id_id"), "checkpoints", ["tenant_id", "id"])
    op.create_index("ix_checkpoints_tenant_id_model_name", "checkpoints", ["tenant_id", "model_name"])
    op.create_table(
        "uploads",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("mime_type", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("file_lifetime_seconds", sa.BigInteger(), nullable=True),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("file_id", sa.Uuid(), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("purged_at", sa.DateTime(timezone=True), nullable=True),
        created_at(),
        sa.CheckConstraint("status in ('pending', 'completed', 'cancelled')", name=op.f("ck_uploads_status_known")),
        sa.CheckConstraint(
            "(status = 'completed') = (file_id is not null)", name=op.f("ck_uploads_file_when_completed")
        ),
        sa.CheckConstraint("size_bytes > 0", name=op.f("ck_uploads_size_positive")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_uploads_tenant_id_tenants")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "file_id"], ["files.tenant_id", "files.id"], name=op.f("fk_uploads_tenant_id_file_id_files")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("uq_uploads_tenant_id_id")),
    )
    op.create_index("ix_uploads_unpurged", "uploads", ["expires_at"], postgresql_where=sa.text("purged_at is null"))
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("upload_id", sa.Uuid(), nullable=False),
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        created_at(),
        sa.ForeignKeyConstraint(
            ["tenant_id", "upload_id"],
            ["uploads.tenant_id", "uploads.id"],
            name=op.f("fk_upload_parts_tenant_id_upload_id_uploads"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload_parts")),
    )
    op.create_index("ix_upload_parts_tenant_id_upload_id", "upload_parts", ["tenant_id", "upload_id"])
    op.create_table(
        "checkpoint_permissions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("checkpoint_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        created_at(),
        sa.ForeignKeyConstraint(
            ["tenant_id", "checkpoint_id"],
            ["checkpoints.tenant_id", "checkpoints.id"],
            name=op.f("fk_checkpoint_permissions_tenant_id_checkpoint_id_checkpoints"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint_permissions")),
        sa.UniqueConstraint(
            "checkpoint_id", "project_id", name=op.f("uq_checkpoint_permissions_checkpoint_id_project_id")
        ),
    )
    op.create_index("ix_checkpoint_permissions_project_id", "checkpoint_permissions", ["project_id"])
    for table in ("uploads", "upload_parts", "checkpoint_permissions"):
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(f"create policy tenant_rows on {table} to espalier_api using ({OWN}) with check ({OWN})")
    op.execute("create policy service_rows on uploads to espalier_schedule using (true)")
    # The tenants named in a permission can read what is shared, and do nothing else.
    op.execute(
        "create policy granted_rows on checkpoint_permissions for select to espalier_api"
        f" using (project_id in ({CURRENT_NAMES}))"
    )
    op.execute(f"create policy shared_rows on checkpoints for select to espalier_api using ({SHARED})")
    op.execute(GRANTS)


def downgrade() -> None:
    op.execute("drop policy shared_rows on checkpoints")
    for table in ("checkpoint_permissions", "upload_parts", "uploads"):
        op.drop_table(table)
    op.drop_index("ix_checkpoints_tenant_id_model_name", table_name="checkpoints")
    op.drop_constraint(op.f("uq_checkpoints_tenant_id_id"), "checkpoints")
    for table in ("adapters", "checkpoints"):
        op.drop_index(f"ix_{table}_deleted", table_name=table)
        op.drop_column(table, "purged_at")
        op.drop_column(table, "deleted_at")
    op.drop_index("ix_files_expires_at", table_name="files")
    op.drop_column("files", "expires_at")
    op.execute("revoke update (deleted_at) on files from espalier_schedule")
    op.execute("revoke select on adapters, checkpoints from espalier_schedule")
