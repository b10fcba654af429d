"""What an operator does by hand, straight on the database that ESPALIER_OWNER_DATABASE_URL names.

Where that is not set, on the database of the local stack that runs on the data directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy.orm import Session

from cli.external import OWNER_URL_SETTING
from cli.servers import find_addresses
from cli.stack import prepare_database
from core.db.migrate import RoleLogin
from core.db.session import connect, service_transaction
from core.domain.api_keys import ALL_SCOPES, DEFAULT_SCOPES, Scope
from core.domain.errors import DomainError
from core.services.base_models import read_registry
from core.services.tenants import create_tenant, find_key_owner, find_tenant, issue_api_key, revoke_api_key

tenants = typer.Typer(no_args_is_help=True, help="Tenants of the service.")
keys = typer.Typer(no_args_is_help=True, help="API keys of tenants.")

DEFAULT_DATA_DIR = Path(".espalier")
DataDir = Annotated[Path, typer.Option(help="Where the local servers keep their data.")]

_ROLES = ("espalier_api", "espalier_worker", "espalier_schedule")


@tenants.command("create")
def create(slug: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Add a tenant and print its first API key."""
    with _owner_session(data_dir) as session:
        tenant = create_tenant(session, slug)
        print(issue_api_key(session, tenant.id, name="first", scopes=ALL_SCOPES).api_key)


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
    with _owner_session(data_dir) as session:
        tenant = find_tenant(session, slug)
        print(issue_api_key(session, tenant.id, name=name, scopes=scopes, lifetime=lifetime).api_key)


@keys.command("revoke")
def revoke_key(key_id: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Revoke an API key by its id, the third part of the key."""
    with _owner_session(data_dir) as session:
        revoke_api_key(session, find_key_owner(session, key_id), key_id=key_id)
    print(f"Revoked {key_id}.")


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
    prepare_database(_owner_url(data_dir), read_registry(registry), logins=logins)


@contextmanager
def _owner_session(data_dir: Path) -> Iterator[Session]:
    engine = connect(_owner_url(data_dir))
    try:
        with service_transaction(engine) as session:
            yield session
    except DomainError as error:
        print(error.message)
        raise typer.Exit(1) from error
    finally:
        engine.dispose()


def _owner_url(data_dir: Path) -> str:
    addresses = find_addresses(data_dir)
    url = os.environ.get(OWNER_URL_SETTING) or (addresses.postgres_url if addresses else None)
    if not url:
        print(
            f"Set {OWNER_URL_SETTING} to the URL of the database's owner, postgresql://..., "
            f"or start a local stack: no servers run on {data_dir}."
        )
        raise typer.Exit(1)
    return url
