"""A small PostgreSQL of one major version, with an owner like that of a managed server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from core.db.migrate import RoleLogin, login_url
from local.ports import free_ports
from local.postgres_server import PostgresServer
from local.private_files import close_data_dir
from local.processes import ChildProcess
from tests.environments import find_postgres_with_tls
from tests.waiting import PATIENCE_SECONDS

PASSWORD = "test-password"
# Starts a PostgreSQL of a major version, once, and returns its superuser's URL.
Clusters = Callable[[int], str]
# Makes roles and owns its database. Row-level security binds it, and nothing lets it pass.
OWNER = RoleLogin("tests_owner", PASSWORD)


@contextmanager
def running_postgres(directory: Path, major: int) -> Iterator[str]:
    """Run a server of this major version; yield its superuser's URL."""
    directory.mkdir(parents=True, exist_ok=True)
    close_data_dir(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPALIER_POSTGRES_BIN", str(find_postgres_with_tls(major)))
        server = PostgresServer(directory, port=free_ports(1)[0], password=PASSWORD, is_durable=False)
    child = ChildProcess(server.prepare(), directory / "logs")
    try:
        child.wait_until(server.answers, timeout_seconds=PATIENCE_SECONDS)
        yield server.url
    finally:
        child.stop()


@contextmanager
def starting_postgres(directory: Path) -> Iterator[Clusters]:
    """Yield what starts servers below this directory. They are stopped at the end."""
    with ExitStack() as stack:
        yield cache(lambda major: stack.enter_context(running_postgres(directory / f"postgres-{major}", major)))


def make_owner(superuser: psycopg.Connection, login: RoleLogin) -> None:
    """Make the role of an owner that is no superuser, unless it is there."""
    statement = sql.SQL(
        "do $$ begin create role {} login createrole password {};"
        " exception when duplicate_object or unique_violation then null; end $$"  # the latter in a race
    )
    superuser.execute(statement.format(sql.Identifier(login.role), sql.Literal(login.password)))


def make_database(superuser_url: str, login: RoleLogin | None) -> str:
    """Make a database and return its owner's URL: that role's, which is made, or the superuser's own."""
    name = f"test_{uuid.uuid4().hex}"
    url = superuser_url.rpartition("/")[0] + f"/{name}"
    with psycopg.connect(superuser_url, autocommit=True) as superuser:
        superuser.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        if login is None:
            return url
        make_owner(superuser, login)
        superuser.execute(
            sql.SQL("alter database {} owner to {}").format(sql.Identifier(name), sql.Identifier(login.role))
        )
    return login_url(url, login)


def superuser_url_of(cluster: str, owner_url: str) -> str:
    """Return the URL by which the superuser reaches an owner's database."""
    return cluster.rpartition("/")[0] + "/" + owner_url.rpartition("/")[2]
