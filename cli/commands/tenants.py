"""What an operator does by hand: tenants, keys, base models, operators, the audit log. The API has it under /admin."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session, owner_url
from core.db.migrate import RoleLogin
from core.domain.api_keys import ALL_SCOPES, DEFAULT_SCOPES, Scope
from core.domain.errors import InvalidRequestError
from core.services import audit as changes
from core.services import base_models as bases
from core.services import operators as operator_keys
from core.services import tenants as services
from core.services.tenants import TenantChange
from local.stack import prepare_database

tenants = typer.Typer(no_args_is_help=True, help="Tenants of the service.")
keys = typer.Typer(no_args_is_help=True, help="API keys of tenants.")
base_models = typer.Typer(no_args_is_help=True, help="Base models of the registry.")
operators = typer.Typer(no_args_is_help=True, help="Keys of operators, which open /admin.")

_ROLES = ("espalier_api", "espalier_worker", "espalier_schedule")
_NO_LIMIT = "none"
_UNCUT_WIDTH = 1000
Limit = Annotated[str | None, typer.Option(help="A number, or none.")]


@tenants.command("create")
def create(slug: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Add a tenant and print its first API key, which may do everything in that tenant."""
    with operator_session(data_dir) as session:
        tenant = services.create_tenant(session, slug)
        print(services.issue_api_key(session, tenant.id, name="first", scopes=ALL_SCOPES).api_key)


@tenants.command("list")
def list_tenants(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show the tenants with their weights, quotas and base models."""
    with operator_session(data_dir) as session:
        rows = services.list_tenants(session, after=None, limit=100_000).items
    columns = ("slug", *TenantChange.LIMITS, "allowed_base_models", "disabled_at")
    _print_table(columns, ([getattr(row, column) for column in columns] for row in rows))


@tenants.command("set")
def change(
    slug: str,
    weight: Annotated[float | None, typer.Option(help="Share of the devices beside the others' weights.")] = None,
    max_running: int | None = None,
    max_queued: int | None = None,
    max_storage_bytes: Limit = None,
    max_tokens_per_job: Limit = None,
    max_gpu_seconds_per_month: Limit = None,
    requests_per_minute: Limit = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="A base model it may use; repeat it, or none for all.")
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Set a tenant's weight, quotas and base models. What is not named stays."""
    given = {
        "weight": weight,
        "max_running": max_running,
        "max_queued": max_queued,
        "max_storage_bytes": max_storage_bytes,
        "max_tokens_per_job": max_tokens_per_job,
        "max_gpu_seconds_per_month": max_gpu_seconds_per_month,
        "requests_per_minute": requests_per_minute,
    }
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    fields = {name: None if value == _NO_LIMIT else value for name, value in fields.items()}
    if allow:
        fields["allowed_base_models"] = None if allow == [_NO_LIMIT] else allow
    _change_tenant(slug, fields, data_dir)


@tenants.command("disable")
def disable(slug: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Refuse all keys of a tenant and start none of its jobs."""
    _change_tenant(slug, {"is_disabled": True}, data_dir)


@tenants.command("enable")
def enable(slug: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Let a disabled tenant in again."""
    _change_tenant(slug, {"is_disabled": False}, data_dir)


@keys.command("create")
def create_key(
    slug: str,
    name: Annotated[str, typer.Option()] = "default",
    scope: Annotated[list[Scope] | None, typer.Option(help="Repeat it; all but admin by default.")] = None,
    days: Annotated[int | None, typer.Option(min=1, help="How long it lives; for ever by default.")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Print a new API key of a tenant. It cannot be shown again."""
    scopes = frozenset(scope or DEFAULT_SCOPES)
    lifetime = timedelta(days=days) if days else None
    with operator_session(data_dir) as session:
        tenant = services.find_tenant(session, slug)
        print(services.issue_api_key(session, tenant.id, name=name, scopes=scopes, lifetime=lifetime).api_key)


@keys.command("list")
def list_keys(slug: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show a tenant's live API keys."""
    with operator_session(data_dir) as session:
        rows = services.list_api_keys(session, services.find_tenant(session, slug).id)
    columns = ("key_id", "name", "scopes", "created_at", "expires_at", "last_used_at")
    _print_table(columns, ([getattr(row, column) for column in columns] for row in rows))


@keys.command("rotate")
def rotate_key(slug: str, name: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Print a new key of this name with the scopes of the newest; the newest goes on working, an older one ends."""
    with operator_session(data_dir) as session:
        print(services.rotate_api_key(session, services.find_tenant(session, slug).id, name=name).api_key)


@keys.command("revoke")
def revoke_key(key_id: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Revoke an API key by its id, the third part of the key."""
    with operator_session(data_dir) as session:
        services.revoke_api_key(session, services.find_key_owner(session, key_id), key_id=key_id)
    print(f"Revoked {key_id}.")


@base_models.command("list")
def list_bases(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show the base models, and which are in the registry and switched on."""
    with operator_session(data_dir) as session:
        rows = bases.list_known_base_models(session)
    columns = ("id", "quantizations", "max_seq_len", "max_rank", "slots", "is_enabled", "disabled_at")
    _print_table(columns, ([getattr(row, column) for column in columns] for row in rows))


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


@operators.command("create")
def create_operator(name: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Print a new operator key, which opens /admin. It cannot be shown again."""
    with operator_session(data_dir) as session:
        print(operator_keys.issue_operator_key(session, name=name))


@operators.command("list")
def list_operators(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show the live operator keys."""
    with operator_session(data_dir) as session:
        rows = operator_keys.list_operator_keys(session)
    columns = ("key_id", "name", "created_at", "last_used_at")
    _print_table(columns, ([getattr(row, column) for column in columns] for row in rows))


@operators.command("revoke")
def revoke_operator(key_id: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Revoke an operator key by its id, the third part of the key."""
    with operator_session(data_dir) as session:
        operator_keys.revoke_operator_key(session, key_id)
    print(f"Revoked {key_id}.")


def audit(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Show who changed what, newest first."""
    with operator_session(data_dir) as session:
        tenant_id = services.find_tenant(session, tenant).id if tenant else None
        rows = changes.list_audit_entries(session, tenant_id, before=None, limit=limit).items
    columns = ("created_at", "actor", "action", "subject", "before", "after")
    _print_table(columns, ([getattr(row, column) for column in columns] for row in rows))


def migrate(
    registry: Annotated[
        Path, typer.Option(envvar="ESPALIER_REGISTRY", exists=True, dir_okay=False, help="Base models (YAML).")
    ],
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Bring the database to the newest schema, load the registry, and let the runtime roles log in.

    A role gets a password only where ESPALIER_API_PASSWORD, ESPALIER_WORKER_PASSWORD or ESPALIER_SCHEDULE_PASSWORD is
    set.
    """
    named = [(role, os.environ.get(f"{role.upper()}_PASSWORD")) for role in _ROLES]
    logins = tuple(RoleLogin(role, password) for role, password in named if password)
    prepare_database(owner_url(data_dir), bases.read_registry(registry), logins=logins)


def _change_tenant(slug: str, fields: dict[str, Any], data_dir: Path) -> None:
    with operator_session(data_dir) as session:
        try:
            wanted = TenantChange.model_validate(fields)
        except ValidationError as error:
            fault = error.errors()[0]
            raise InvalidRequestError(f"{fault['loc'][0]}: {fault['msg']}.") from error
        services.change_tenant(session, slug, change=wanted)


def _print_table(columns: Iterable[str], rows: Iterable[list[Any]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(_text(value)) for value in row))
    # A file or a pipe has no width: nothing is cut for it.
    Console(width=None if sys.stdout.isatty() else _UNCUT_WIDTH).print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
