"""Invalid rows that no bound would allow, inserted by the tables' owner, as a bug or a manual statement might."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import Engine, text

from core.db.session import service_transaction


def drop_checks(owner: Engine, *tables: str) -> None:
    """Let a module's own database take numbers out of bounds."""
    query = "select conrelid::regclass::text, conname from pg_constraint where contype = 'c' and conrelid = any"
    with service_transaction(owner) as session:
        for table, name in session.execute(text(f"{query} (cast(:tables as regclass[]))"), {"tables": list(tables)}):
            session.execute(text(f"alter table {table} drop constraint {name}"))


def change(owner: Engine, table: str, row_id: uuid.UUID, **values: Any) -> None:
    """Set columns of a row to SQL expressions, past its triggers."""
    assignments = ", ".join(f"{column} = {expression}" for column, expression in values.items())
    with service_transaction(owner) as session:
        session.execute(text(f"alter table {table} disable trigger user"))
        session.execute(text(f"update {table} set {assignments} where id = :id"), {"id": row_id})
        session.execute(text(f"alter table {table} enable trigger user"))


def break_row(
    owner: Engine, table: str, column: str, value: Any, *, verb: str = "update", errcode: str = "22003"
) -> None:
    """Make every later write to the rows with that value fail, as a number that is out of range does by default."""
    name = f"poison_{uuid.uuid4().hex}"
    with service_transaction(owner) as session:
        session.execute(
            text(f"""
            create function {name}() returns trigger language plpgsql as $$
            begin
                raise exception 'value out of range: overflow' using errcode = '{errcode}';
            end $$
            """)
        )
        session.execute(
            text(f"""
            create trigger {name} before {verb} on {table} for each row
            when (new.{column}::text = '{value}') execute function {name}()
            """)
        )
