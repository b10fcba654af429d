"""The schema and the code say the same, and every migration can be taken back."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from psycopg import sql
from sqlalchemy import Connection, text

from cli.servers import ServerAddresses
from core.db.migrate import MIGRATIONS_DIR
from core.db.session import connect

SCHEMA = """
    select table_name, column_name, data_type, is_nullable from information_schema.columns
    where table_schema = 'public' and table_name <> 'alembic_version' order by 1, 2
"""
POLICIES = "select tablename, policyname, roles::text, qual, with_check from pg_policies order by 1, 2"
GRANTS = """
    select grantee, table_name, column_name, privilege_type from information_schema.column_privileges
    where grantee like 'espalier%' and table_name <> 'alembic_version' order by 1, 2, 3, 4
"""


@pytest.fixture
def connection(servers: ServerAddresses) -> Iterator[Connection]:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(servers.postgres_url, autocommit=True) as owner:
        owner.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        engine = connect(servers.postgres_url.rpartition("/")[0] + f"/{name}")
        with engine.connect() as opened:
            yield opened
        engine.dispose()
        owner.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def configure(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIR))
    config.attributes["connection"] = connection
    return config


def facts(connection: Connection) -> list[list[tuple[object, ...]]]:
    return [[tuple(row) for row in connection.execute(text(query))] for query in (SCHEMA, POLICIES, GRANTS)]


def test_the_tables_of_the_code_are_those_of_the_migrations(connection: Connection) -> None:
    config = configure(connection)
    command.upgrade(config, "head")
    command.check(config)


def test_every_migration_can_be_taken_back_and_made_again(connection: Connection) -> None:
    config = configure(connection)
    command.upgrade(config, "0001")
    first = facts(connection)
    command.upgrade(config, "head")
    newest = facts(connection)
    command.downgrade(config, "0001")
    assert facts(connection) == first
    command.upgrade(config, "head")
    assert facts(connection) == newest
    command.downgrade(config, "base")
    assert facts(connection) == [[], [], []]
