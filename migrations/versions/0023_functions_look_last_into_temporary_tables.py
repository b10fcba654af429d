"""No function that runs as its owner finds a caller's temporary table in the place of one of ours.

A search path that leaves `pg_temp` out has it first, for tables and views. Whoever may execute such a function, or
select from a view that calls it, could then make a temporary view named `jobs` and have it evaluated with the rights of
the function's owner. Named last, `pg_temp` is looked into for what exists nowhere else. `record_change` had it from
the start.

No process of ours makes temporary tables, so PUBLIC may make none in this database. Only the database's owner can take
that right away. From anybody else the statement is a warning, the right stays, and the search path alone has to do.
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
    """Take the search path back. The right to temporary tables stays away: no version has used it."""
    for function in FUNCTIONS:
        op.execute(f"alter function {function} set search_path = pg_catalog, public")
