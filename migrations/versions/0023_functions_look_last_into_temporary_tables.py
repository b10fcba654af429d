"""No function that runs as its owner can take a caller's temporary table for one of ours.

A search path without `pg_temp` searches it first, for tables and views. A role that may execute such a function, or
select from a view that calls it, could then make a temporary view named `jobs`, which would be evaluated with the
rights of the function's owner. If `pg_temp` is named last, it is searched last. `record_change` had this from the
start.

Our processes make no temporary tables, so PUBLIC may make none in this database. Only the database's owner can revoke
this right. From another role the statement is only a warning and the right stays; then the search path is the only
protection.
"""

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

FUNCTIONS = (
    "pool_outlook(text, uuid, float8, float8)",
    "queue_outlook(text, uuid, float8, float8, float8, bigint)",
    "count_pool_demand(text)",
)
REVOKE_TEMPORARY = """
do $$ begin
    execute format('revoke temporary on database %I from public', current_database());
end $$
"""


def upgrade() -> None:
    for function in FUNCTIONS:
        op.execute(f"alter function {function} set search_path = pg_catalog, public, pg_temp")
    op.execute(REVOKE_TEMPORARY)


def downgrade() -> None:
    """Restore the search path. The right to temporary tables stays revoked: no version has used it."""
    for function in FUNCTIONS:
        op.execute(f"alter function {function} set search_path = pg_catalog, public")
