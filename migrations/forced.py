"""Lets a migration see all rows: forced row-level security binds a table's owner too, unless it is a superuser.

Otherwise a migration by the owner of a managed PostgreSQL would see no rows and change none, without an error. Lifting
it locks the tables for all until the migration ends, so a superuser's migration does not do it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

_FORCED = sa.text("""
select relname from pg_class
where relnamespace = current_schema()::regnamespace and relkind = 'r' and relforcerowsecurity
  and not (select rolsuper or rolbypassrls from pg_roles where rolname = current_user)
order by relname
""")


@contextmanager
def unforced() -> Iterator[None]:
    """Let the owner see and change all rows in this block. Other transactions do not see this change."""
    tables = op.get_bind().scalars(_FORCED).all()
    for table in tables:
        op.execute(f"alter table {table} no force row level security")
    yield
    for table in tables:
        op.execute(f"alter table {table} force row level security")
