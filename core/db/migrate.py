"""Upgrades a database to the newest schema and gives the three runtime roles their logins.

The owner of the tables, who migrates, never serves requests. API, worker and schedule each have a role of their own
with narrow grants, and none of these roles may bypass row-level security.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import stamina
from alembic import command
from alembic.config import Config
from psycopg import sql
from sqlalchemy import Engine

from core.database_urls import with_login
from core.db.revisions import MIGRATIONS_DIR
from core.db.session import connect, state_of

_MAX_TRIES = 10
# SQLSTATEs: "tuple concurrently updated", a role that exists already, and a lock that was not free in time.
_IN_THE_WAY = ("XX000", "23505", "55P03")


@dataclass(frozen=True)
class RoleLogin:
    """A role (`espalier_api`, `_worker`, `_schedule`, or `_scaler`) and its password."""

    role: str
    password: str


def migrate_database(owner_url: str, *, logins: tuple[RoleLogin, ...] = ()) -> None:
    """Apply every migration and set the logins. `owner_url` is the owner's (core.database_urls)."""
    engine = connect(owner_url)
    try:
        for attempt in stamina.retry_context(
            on=_is_in_the_way, attempts=_MAX_TRIES, timeout=None, wait_initial=0.1, wait_max=2.0
        ):
            with attempt:
                _migrate(engine, logins)
    finally:
        engine.dispose()


def _migrate(engine: Engine, logins: tuple[RoleLogin, ...]) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIR))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        driver: Any = connection.connection.driver_connection
        for login in logins:
            # PostgreSQL logs statements that fail. This one contains the verifier of the password, not the password.
            verifier = driver.pgconn.encrypt_password(login.password.encode(), login.role.encode(), b"scram-sha-256")
            statement = sql.SQL("alter role {} login password {}").format(
                sql.Identifier(login.role), sql.Literal(verifier.decode())
            )
            connection.exec_driver_sql(statement.as_string(driver))


def _is_in_the_way(error: Exception) -> bool:
    """Return whether another transaction was in the way, most often another database's migration: roles belong to all.

    Nothing has been changed then, so the migration may be tried again.
    """
    return state_of(error) in _IN_THE_WAY


def login_url(owner_url: str, login: RoleLogin) -> str:
    """Return the URL by which a runtime role reaches the owner's database."""
    return with_login(owner_url, user=login.role, password=login.password)
