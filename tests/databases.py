"""Databases as tests have them: one a test module, with a login for each role of the service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import Engine, event, text

from core.db.migrate import RoleLogin, login_url
from core.db.session import connect, service_transaction
from local.servers import ServerAddresses
from tests.clusters import OWNER, PASSWORD, make_owner

LOGINS = tuple(RoleLogin(f"espalier_{name}", PASSWORD) for name in ("api", "worker", "schedule", "scaler"))


@dataclass(frozen=True)
class Database:
    """A migrated database: its owner's URL, its server's superuser's, and one URL a runtime role."""

    owner_url: str
    superuser_url: str
    api_url: str
    worker_url: str
    schedule_url: str
    scaler_url: str


def create_database(servers: ServerAddresses, name: str, *, template: str = "template1") -> None:
    """Make a database that belongs to `OWNER`, whom all test processes of one server share: so are the roles it makes."""
    statement = sql.SQL("create database {} template {} owner {}").format(
        sql.Identifier(name), sql.Identifier(template), sql.Identifier(OWNER.role)
    )
    with psycopg.connect(servers.postgres_url, autocommit=True) as connection:
        make_owner(connection, OWNER)
        connection.execute(statement)


def url_of(servers: ServerAddresses, name: str) -> str:
    return servers.postgres_url.rpartition("/")[0] + f"/{name}"


def owner_url_of(servers: ServerAddresses, name: str) -> str:
    return login_url(url_of(servers, name), OWNER)


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    """Yield an engine on a URL, which says whose role it has."""
    engine = connect(url)
    yield engine
    engine.dispose()


def run(owner: Engine, statement: str, **values: Any) -> None:
    """Run one statement in a transaction of its own."""
    with service_transaction(owner) as session:
        session.execute(text(statement), values)


@contextmanager
def statements_of(engine: Engine) -> Iterator[list[tuple[str, Any]]]:
    """Yield the statements that are sent within the block, each with its parameters."""
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_others: Any) -> None:
        seen.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine, "before_cursor_execute", note)


def num_waiting(database: Database) -> int:
    """Return how many connections to the database wait for a lock."""
    question = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    with psycopg.connect(database.superuser_url) as connection:
        (num,) = connection.execute(question).fetchone() or (0,)
    return int(num)
