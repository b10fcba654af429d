"""Opens every table to two roles that read all rows and change none: `espalier_auditor` and `espalier_backup`.

A migration that makes a table calls `let_readers_in`. A test searches the catalogue for tables that were forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa
from alembic import op

READERS = "espalier_auditor, espalier_backup"
_IS_WALLED = sa.text("select relrowsecurity from pg_class where oid = cast(:table as regclass)")


def let_readers_in(tables: Iterable[str]) -> None:
    """Let both roles read these tables in spite of row-level security, and let a dump read the state of sequences."""
    for table in tables:
        op.execute(f"grant select on {table} to {READERS}")
        if op.get_bind().scalar(_IS_WALLED, {"table": table}):
            op.execute(f"create policy reader_rows on {table} for select to {READERS} using (true)")
    op.execute("grant select on all sequences in schema public to espalier_backup")
