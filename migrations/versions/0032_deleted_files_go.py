"""The row of a deleted file is deleted after a while, once no job and no upload names the file.

The indexes find the rows that name a file. Without them every deletion would read its tenant's jobs three times.
"""

import sqlalchemy as sa
from alembic import op

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None

NAMES = {
    "ix_jobs_training_file_id": ("jobs", "training_file_id"),
    "ix_jobs_validation_file_id": ("jobs", "validation_file_id"),
    "ix_jobs_result_file_id": ("jobs", "result_file_id"),
    "ix_uploads_file_id": ("uploads", "file_id"),
}
# What 0030 lets the schedule delete: at once with its job or tenant. Now also what has had no object for a day.
OF_A_DELETED_TENANT = "(select t.deleted_at from tenants t where t.id = files.tenant_id) is not null"
IS_DELETED = f"purged_at is not null and (purpose = 'fine-tune-results' or {OF_A_DELETED_TENANT})"
IS_OLD = "purged_at < now() - interval '1 day'"


def upgrade() -> None:
    for name, (table, column) in NAMES.items():
        is_named = None if column == "training_file_id" else sa.text(f"{column} is not null")
        op.create_index(name, table, [column], postgresql_where=is_named)
    op.create_index(
        "ix_files_purged_at", "files", ["purged_at", "id"], postgresql_where=sa.text("purged_at is not null")
    )
    op.execute(f"alter policy deleted_rows on files using ({IS_OLD} or {IS_DELETED})")


def downgrade() -> None:
    op.execute(f"alter policy deleted_rows on files using ({IS_DELETED})")
    op.drop_index("ix_files_purged_at", table_name="files")
    for name, (table, _column) in NAMES.items():
        op.drop_index(name, table_name=table)
