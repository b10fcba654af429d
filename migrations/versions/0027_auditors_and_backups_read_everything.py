"""Two roles read every row and change none: an auditor, who checks the contract, and a backup, which `pg_dump` becomes.

Row-level security binds an owner that is no superuser, as on a managed PostgreSQL, where nobody may have BYPASSRLS. Such
an owner sees some tables and not others. It becomes one of these roles where it has to see everything.
"""

import sqlalchemy as sa
from alembic import op

from migrations.readers import READERS, let_readers_in

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

TABLES = sa.text("""
select relname from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') order by relname
""")
WALLED = sa.text(
    "select tablename from pg_policies where schemaname = 'public' and policyname = 'reader_rows' order by 1"
)
# Roles belong to the whole server. Another database's migration may have made this one, or the server's administrator,
# for an owner that may not make roles.
MAKE = """
do $$ begin
    if to_regrole('{role}') is null then
        create role {role} nologin;
    end if;
exception when duplicate_object then null;
end $$
"""
# Before PostgreSQL 16 every member may become its role. Since then the role that made it is a member, but may not.
BECOME = """
do $$ begin
    if current_setting('server_version_num')::int < 160000 then
        if not pg_has_role(current_user, '{role}', 'MEMBER') then
            execute format('grant {role} to %I', current_user);
        end if;
    elsif not pg_has_role(current_user, '{role}', 'SET') then
        execute format('grant {role} to %I with set true, inherit false', current_user);
    end if;
end $$
"""


def upgrade() -> None:
    for role in READERS.split(", "):
        op.execute(MAKE.format(role=role))
        op.execute(f"grant usage on schema public to {role}")
        op.execute(BECOME.format(role=role))
    let_readers_in(op.get_bind().scalars(TABLES).all())


def downgrade() -> None:
    """Revoke everything from the roles. They stay, because another database may use them."""
    for table in op.get_bind().scalars(WALLED).all():
        op.execute(f"drop policy reader_rows on {table}")
    op.execute(f"revoke all on all tables in schema public from {READERS}")
    op.execute(f"revoke all on all sequences in schema public from {READERS}")
    op.execute(f"revoke usage on schema public from {READERS}")
