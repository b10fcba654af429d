"""`espalier keys`: operators make, list, rotate and revoke API keys of tenants."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from cli.output import fields_of, print_rows, say
from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from core.domain.api_keys import Scope
from core.domain.bounds import MAX_KEY_DAYS
from core.services import api_keys, tenants

keys = typer.Typer(no_args_is_help=True, help="API keys of tenants.")


@keys.command("create")
def create_key(
    slug: str,
    name: Annotated[str, typer.Option()] = "default",
    scope: Annotated[list[Scope] | None, typer.Option(help="Repeat it; all but admin by default.")] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=MAX_KEY_DAYS, help="How long it lives; for ever by default.")
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Print a new API key of a tenant. It cannot be shown again."""
    scopes = frozenset(scope) if scope else None
    lifetime = timedelta(days=days) if days else None
    with operator_session(data_dir) as session:
        tenant = tenants.find_tenant(session, slug)
        issued = api_keys.issue_api_key(session, tenant.id, name=name, scopes=scopes, lifetime=lifetime)
    say(str(issued.api_key), api_key=str(issued.api_key), name=name, tenant=slug)


@keys.command("list")
def list_keys(slug: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show a tenant's live API keys."""
    with operator_session(data_dir) as session:
        rows = api_keys.list_api_keys(session, tenants.find_tenant(session, slug).id)
    columns = ("key_id", "name", "scopes", "created_by", "created_at", "expires_at", "last_used_at")
    print_rows(columns, (fields_of(row, columns) for row in rows))


@keys.command("rotate")
def rotate_key(
    slug: str,
    name: str,
    days: Annotated[
        int | None, typer.Option(min=1, max=MAX_KEY_DAYS, help="How long it lives; as the newest by default.")
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Print a new key of this name with all that the newest has; the newest goes on working, an older one ends."""
    lifetime = timedelta(days=days) if days else None
    with operator_session(data_dir) as session:
        tenant = tenants.find_tenant(session, slug)
        issued = api_keys.rotate_api_key(session, tenant.id, name=name, lifetime=lifetime)
    say(str(issued.api_key), api_key=str(issued.api_key), name=name, tenant=slug)


@keys.command("revoke")
def revoke_key(
    key_id: str,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    with_children: Annotated[bool, typer.Option("--with-children", help="Also the keys that came of it.")] = False,
) -> None:
    """Revoke an API key by its id, the third part of the key."""
    with operator_session(data_dir) as session:
        owner = api_keys.find_key_owner(session, key_id)
        api_keys.revoke_api_key(session, owner, key_id=key_id, with_children=with_children)
    say(f"Revoked {key_id}.", revoked=key_id)
