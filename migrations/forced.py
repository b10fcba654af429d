"""Row-level security binds a table's owner too, unless it is a superuser: what a migration does to rows lifts that.

Without it a migration by an owner of a managed PostgreSQL would see no row, change none and say nothing. It locks the
tables, for everybody, until the migration ends: a superuser's migration leaves them alone.
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
    """Let the owner see and change all rows in this block. The transaction of the migration hides it from others."""
    tables = op.get_bind().scalars(_FORCED).all()
    for table in tables:
        op.execute(f"alter table {table} no force row level security")
    yield
    for table in tables:
        op.execute(f"alter table {table} force row level security")
