"""`espalier base-models`: the registry as an operator sees and switches it."""

from __future__ import annotations

import typer

from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from cli.tables import print_table
from core.services import base_models as bases

base_models = typer.Typer(no_args_is_help=True, help="Base models of the registry.")


@base_models.command("list")
def list_bases(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show the base models, and which are in the registry and switched on."""
    with operator_session(data_dir) as session:
        rows = bases.list_known_base_models(session)
    columns = ("id", "quantizations", "max_seq_len", "max_rank", "slots", "is_enabled", "disabled_at")
    print_table(columns, ([getattr(row, column) for column in columns] for row in rows))


@base_models.command("disable")
def disable_base(base_model_id: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Refuse new jobs on a base model, whatever the registry says."""
    with operator_session(data_dir) as session:
        bases.switch_base_model(session, base_model_id, is_disabled=True)


@base_models.command("enable")
def enable_base(base_model_id: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Take new jobs on a base model again."""
    with operator_session(data_dir) as session:
        bases.switch_base_model(session, base_model_id, is_disabled=False)
