"""`espalier operators`: keys of operators, which open /admin."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from cli.output import fields_of, print_rows, say
from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from core.domain.bounds import MAX_KEY_DAYS
from core.services import operators as operator_keys

operators = typer.Typer(no_args_is_help=True, help="Keys of operators, which open /admin.")
Days = Annotated[int | None, typer.Option(min=1, max=MAX_KEY_DAYS, help="How long it lives; for ever by default.")]


@operators.command("create")
def create_operator(
    name: str,
    days: Days = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    is_read_only: Annotated[
        bool, typer.Option("--read-only", help="May read everything under /admin, and change nothing.")
    ] = False,
) -> None:
    """Print a new operator key, which opens /admin. It cannot be shown again."""
    lifetime = timedelta(days=days) if days else None
    with operator_session(data_dir) as session:
        issued = operator_keys.issue_operator_key(session, name=name, lifetime=lifetime, is_read_only=is_read_only)
    key = str(issued)
    say(key, api_key=key, name=name, is_read_only=is_read_only)


@operators.command("list")
def list_operators(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show the live operator keys, and which of them may only read."""
    with operator_session(data_dir) as session:
        rows = operator_keys.list_operator_keys(session)
    columns = ("key_id", "name", "is_read_only", "created_at", "expires_at", "last_used_at")
    print_rows(columns, (fields_of(row, columns) for row in rows))


@operators.command("revoke")
def revoke_operator(key_id: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Revoke an operator key by its id, the third part of the key."""
    with operator_session(data_dir) as session:
        operator_keys.revoke_operator_key(session, key_id)
    say(f"Revoked {key_id}.", revoked=key_id)
