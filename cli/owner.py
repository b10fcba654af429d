"""How operators' commands reach the database: by its owner's URL, usually in the operator's role, with an audit name.

The URL is ESPALIER_OWNER_DATABASE_URL (or in a file), or that of the local stack that runs on the data directory.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import Engine

from cli.environment import reading_settings
from cli.output import fail
from core.db.session import OperatorSession, connect, operator_transaction
from core.settings import OwnerSettings
from local.external import OWNER_URL_SETTING
from local.servers import find_addresses

DEFAULT_DATA_DIR = Path(".espalier")
DataDir = Annotated[Path, typer.Option(help="Where the local servers keep their data.")]


@contextmanager
def operator_session(data_dir: Path) -> Iterator[OperatorSession]:
    """Open an operator's transaction. Errors end the command with one line (cli.reporting)."""
    with owner_engine(data_dir) as engine, operator_transaction(engine, actor=actor()) as session:
        yield session


@contextmanager
def owner_engine(data_dir: Path) -> Iterator[Engine]:
    """Yield an engine in the role of the tables' owner. Errors are as in `operator_session`."""
    engine = connect(owner_url(data_dir))
    try:
        yield engine
    finally:
        engine.dispose()


def actor() -> str:
    """Return the name of the user of this command in the audit log."""
    return f"cli:{_who()}"


def owner_url(data_dir: Path, *, exit_code: int = 1) -> str:
    """Return the owner's URL. If it is missing or no URL of a database, the command ends."""
    addresses = find_addresses(data_dir)
    with reading_settings():
        url = OwnerSettings().owner_url or (addresses.postgres_url if addresses else None)
    if not url:
        fail(
            f"Set {OWNER_URL_SETTING} to the URL of the database's owner, postgresql://..., "
            f"or start a local stack: no servers run on {data_dir} (--data-dir).",
            exit_code=exit_code,
        )
    return url


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        return str(os.getuid())
