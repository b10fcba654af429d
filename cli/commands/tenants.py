"""`espalier tenants`: who may use the service, and how much of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cli.output import as_text, fail, fields_of, print_rows, say, tell
from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from cli.reporting import without_pydantic
from cli.tables import Column
from core.db.models import Tenant
from core.domain.api_keys import ALL_SCOPES
from core.domain.errors import InvalidRequestError
from core.services import api_keys
from core.services import tenants as services
from core.services.tenants import TenantChange

tenants = typer.Typer(no_args_is_help=True, help="Tenants of the service.")

_NO_LIMIT = "none"
_COLUMNS = (
    "slug",
    "weight",
    Column("max_running", "running"),
    Column("max_queued", "queued"),
    Column("max_storage_bytes", "stored bytes"),
    Column("max_tokens_per_job", "tokens a job"),
    Column("max_gpu_seconds_per_month", "GPU s a month"),
    Column("requests_per_minute", "requests a minute"),
    Column("allowed_base_models", "bases"),
    Column("disabled_at", "disabled"),
    "deletion",
)
Limit = Annotated[str | None, typer.Option(help="A number, or none.")]


@tenants.command("create")
def create(slug: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Add a tenant and print its first API key, which may do everything in that tenant."""
    with operator_session(data_dir) as session:
        tenant = services.create_tenant(session, slug)
        api_key = str(api_keys.issue_api_key(session, tenant.id, name="first", scopes=ALL_SCOPES).api_key)
    say(api_key, api_key=api_key, tenant=slug)


@tenants.command("list")
def list_tenants(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show the tenants with their weights, quotas and base models."""
    with operator_session(data_dir) as session:
        rows = services.list_tenants(session, after=None, limit=100_000).items
    names = ("slug", *TenantChange.LIMITS, "allowed_base_models", "disabled_at", "deleted_at", "erased_at")
    print_rows(_COLUMNS, ({**fields_of(row, names), "deletion": _deletion_of(row)} for row in rows))


def _deletion_of(row: Tenant) -> str | None:
    if row.deleted_at is None:
        return None
    return "being deleted" if row.erased_at is None else "deleted"


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
    told = ", ".join(f"{name} {_NO_LIMIT if value is None else as_text(value)}" for name, value in fields.items())
    _change_tenant(slug, fields, data_dir, said=f"Tenant {slug}: {told or 'nothing was named, and all stays'}.")


@tenants.command("disable")
def disable(slug: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Refuse all keys of a tenant and start none of its jobs."""
    _change_tenant(slug, {"is_disabled": True}, data_dir, said=f"Tenant {slug} is disabled.")


@tenants.command("enable")
def enable(slug: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Let a disabled tenant in again."""
    _change_tenant(slug, {"is_disabled": False}, data_dir, said=f"Tenant {slug} is enabled.")


@tenants.command("delete")
def delete(
    slug: str,
    *,
    is_sure: Annotated[bool, typer.Option("--yes", help="Do not ask to type the slug.")] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Delete a tenant with its jobs, models, files and keys, for ever."""
    with operator_session(data_dir) as session:
        services.find_tenant(session, slug)
    if not is_sure:
        _ask_for(slug)
    with operator_session(data_dir) as session:
        deleted = services.delete_tenant(session, slug).slug
    say(
        f"Tenant {slug} is now {deleted}. Its keys are refused, its jobs are cancelled, and all that it has is erased. "
        f"`espalier tenants list` says of {deleted} when nothing is left but its bookings.",
        tenant=deleted,
    )


def _ask_for(slug: str) -> None:
    """Ask the user to type the slug."""
    if not sys.stdin.isatty():
        fail("This deletes a tenant for ever, and nobody is there to be asked. Say --yes.")
    tell(f"This deletes all jobs, models, files, uploads and keys of the tenant {slug}. Nothing can bring them back.")
    if typer.prompt("Type its slug to delete it", err=True) != slug:
        fail("That is another slug. Nothing was deleted.")


def _change_tenant(slug: str, fields: dict[str, Any], data_dir: Path, *, said: str) -> None:
    with operator_session(data_dir) as session:
        try:
            wanted = TenantChange.model_validate(fields)
        except ValidationError as error:
            fault = error.errors()[0]
            raise InvalidRequestError(f"{fault['loc'][0]}: {without_pydantic(fault['msg'])}.") from error
        services.change_tenant(session, slug, change=wanted)
    say(said, tenant=slug, changed=fields)
