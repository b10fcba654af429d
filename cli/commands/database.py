"""`espalier migrate`: the schema, the registry and the runtime roles of a database."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cli.output import is_json, print_json
from cli.owner import DEFAULT_DATA_DIR, DataDir, owner_url
from core.db.migrate import RoleLogin
from core.services import base_models as bases
from local.stack import prepare_database

_ROLES = ("espalier_api", "espalier_worker", "espalier_schedule", "espalier_scaler")


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
    named = [(role, os.environ.get(f"{role.upper()}_PASSWORD")) for role in _ROLES]
    logins = tuple(RoleLogin(role, password) for role, password in named if password)
    loaded = bases.read_registry(registry)
    prepare_database(owner_url(data_dir), loaded, logins=logins)
    if is_json():
        print_json({"base_models": [each.id for each in loaded.base_models], "logins": [each.role for each in logins]})
