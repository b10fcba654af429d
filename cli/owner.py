"""How commands of an operator reach the database: by its owner's URL, in the operator's role, under the user's name.

The URL is ESPALIER_OWNER_DATABASE_URL, or that of the local stack that runs on the data directory.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy.orm import Session

from core.db.session import connect, operator_transaction
from core.domain.errors import DomainError
from local.external import OWNER_URL_SETTING
from local.servers import find_addresses

DEFAULT_DATA_DIR = Path(".espalier")
DataDir = Annotated[Path, typer.Option(help="Where the local servers keep their data.")]


@contextmanager
def operator_session(data_dir: Path) -> Iterator[Session]:
    """Open an operator's transaction. An error that may be shown is printed and ends the command."""
    engine = connect(owner_url(data_dir))
    try:
        with operator_transaction(engine, actor=f"cli:{_who()}") as session:
            yield session
    except DomainError as error:
        print(error.message)
        raise typer.Exit(1) from error
    finally:
        engine.dispose()


def owner_url(data_dir: Path) -> str:
    addresses = find_addresses(data_dir)
    url = os.environ.get(OWNER_URL_SETTING) or (addresses.postgres_url if addresses else None)
    if not url:
        print(
            f"Set {OWNER_URL_SETTING} to the URL of the database's owner, postgresql://..., "
            f"or start a local stack: no servers run on {data_dir}."
        )
        raise typer.Exit(1)
    return url


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        return str(os.getuid())
