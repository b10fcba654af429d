"""`espalier migrate`: the schema, the registry and the runtime roles of a database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.environment import reading_settings
from cli.output import say
from cli.owner import DEFAULT_DATA_DIR, DataDir, owner_url
from core.db.migrate import RoleLogin
from core.services.registry import read_registry
from core.settings import LoginSettings
from local.stack import prepare_database


def migrate(
    registry: Annotated[
        Path, typer.Option(envvar="ESPALIER_REGISTRY", exists=True, dir_okay=False, help="Base models (YAML).")
    ],
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Bring the database to the newest schema, load the registry, and let the runtime roles log in.

    A role gets a password only where ESPALIER_API_PASSWORD, ESPALIER_WORKER_PASSWORD, ESPALIER_SCHEDULE_PASSWORD or
    ESPALIER_SCALER_PASSWORD is set.
    """
    with reading_settings():
        logins = tuple(RoleLogin(role, password) for role, password in LoginSettings().passwords.items())
    loaded = read_registry(registry)
    prepare_database(owner_url(data_dir), loaded, logins=logins)
    models, roles = [each.id for each in loaded.base_models], [each.role for each in logins]
    said = f"The schema is the newest; the registry has {len(models)} base models; "
    said += f"passwords were set for {', '.join(roles)}." if roles else "no role's password was set."
    say(said, base_models=models, logins=roles)
