"""The schema matches the code, and every migration can be reverted."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic import command
from psycopg import sql
from sqlalchemy import Connection, text

from core.db.migrate import migrate_database
from core.db.session import connect, operator_transaction
from local.servers import LocalServers, ServerAddresses
from tests.clusters import PASSWORD
from tests.databases import create_database, owner_url_of
from tests.integration.histories import configure
from tests.waiting import wait_until

SCHEMA = """
    select table_name, column_name, data_type, is_nullable from information_schema.columns
    where table_schema = 'public' and table_name <> 'alembic_version' order by 1, 2
"""
POLICIES = "select tablename, policyname, roles::text, qual, with_check from pg_policies order by 1, 2"
MIGRATE = f"""
import sys
from core.db.migrate import RoleLogin, migrate_database
migrate_database(sys.argv[1], logins=(RoleLogin("espalier_api", {PASSWORD!r}), RoleLogin("espalier_worker", {PASSWORD!r})))
"""
GRANTS = """
    select grantee, table_name, column_name, privilege_type from information_schema.column_privileges
    where grantee like 'espalier%' and table_name <> 'alembic_version' order by 1, 2, 3, 4
"""


def facts(connection: Connection) -> list[list[tuple[object, ...]]]:
    return [[tuple(row) for row in connection.execute(text(query))] for query in (SCHEMA, POLICIES, GRANTS)]


def may_make_temporary_tables(connection: Connection, role: str) -> bool:
    query = text("select has_database_privilege(:role, current_database(), 'temporary')")
    return bool(connection.scalar(query, {"role": role}))


def test_no_runtime_role_may_make_temporary_tables(connection: Connection) -> None:
    command.upgrade(configure(connection), "head")
    assert not may_make_temporary_tables(connection, "espalier_scaler")
    assert may_make_temporary_tables(connection, str(connection.scalar(text("select current_user"))))


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


def test_databases_of_one_cluster_can_be_migrated_at_once(servers: ServerAddresses) -> None:
    """They share their roles: whoever comes second must wait for the first, not fail."""
    names = [f"test_{uuid.uuid4().hex}" for _ in range(4)]
    for name in names:
        create_database(servers, name)
    urls = [owner_url_of(servers, name) for name in names]
    with psycopg.connect(servers.postgres_url, autocommit=True) as owner:
        with ThreadPoolExecutor(len(urls)) as threads:
            migrations = [
                threads.submit(subprocess.run, [sys.executable, "-c", MIGRATE, url], check=True) for url in urls
            ]
        for migration in migrations:
            migration.result()
        for name in names:
            owner.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.mark.usefixtures("migrated")  # which has made the roles
def test_a_migration_outwaits_another_transaction_that_holds_the_roles_for_longer_than_a_lock_is_waited_for(
    servers: ServerAddresses,
) -> None:
    name = f"test_{uuid.uuid4().hex}"
    create_database(servers, name)
    url = owner_url_of(servers, name)
    blocked = "select xact_start from pg_stat_activity where datname = %s and wait_event_type = 'Lock'"
    tries: set[dt.datetime] = set()

    with psycopg.connect(servers.postgres_url, autocommit=True) as owner:

        def has_tried_again() -> bool:
            tries.update(row[0] for row in owner.execute(blocked, [name]))
            return len(tries) > 1 or migration.poll() is not None

        with psycopg.connect(servers.postgres_url) as other:
            other.execute("alter role espalier_api password 'of-another-database'")
            migration = subprocess.Popen([sys.executable, "-c", MIGRATE, url])
            wait_until(has_tried_again)
            other.rollback()
        assert migration.wait() == 0
        owner.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def test_an_owner_that_is_no_superuser_migrates_and_can_act_as_an_operator(tmp_path: Path) -> None:
    """As on a managed PostgreSQL: the owner may make roles and databases, and is a member of the roles that it makes."""
    with LocalServers(tmp_path, is_durable=False) as own:
        admin_url = own.addresses.postgres_url
        place = admin_url.rpartition("@")[2].rpartition("/")[0]
        with psycopg.connect(admin_url, autocommit=True) as admin:
            admin.execute("create role manager login createrole createdb password 'manager-password'")
        manager_url = f"postgresql://manager:manager-password@{place}"
        with psycopg.connect(f"{manager_url}/postgres", autocommit=True) as manager:
            manager.execute("create database service")
        migrate_database(f"{manager_url}/service")
        engine = connect(f"{manager_url}/service")
        with operator_transaction(engine, actor="test") as session:
            assert session.scalars(text("select current_user")).one() == "espalier_operator"
            assert session.execute(text("select pool from pool_demand")).all() == []
        with engine.connect() as connection:
            assert not may_make_temporary_tables(connection, "espalier_scaler")
            assert may_make_temporary_tables(connection, "manager")
        engine.dispose()


def test_an_owner_of_the_schema_alone_migrates_too(tmp_path: Path) -> None:
    """The database is somebody else's, who alone may say who makes temporary tables in it."""
    with LocalServers(tmp_path, is_durable=False) as own:
        admin_url = own.addresses.postgres_url
        place = admin_url.rpartition("@")[2].rpartition("/")[0]
        with psycopg.connect(admin_url, autocommit=True) as admin:
            admin.execute("create role guest login createrole password 'guest-password'")
            admin.execute("create database lent")
        with psycopg.connect(f"{admin_url.rpartition('/')[0]}/lent", autocommit=True) as admin:
            admin.execute("alter schema public owner to guest")
        guest_url = f"postgresql://guest:guest-password@{place}/lent"
        migrate_database(guest_url)
        engine = connect(guest_url)
        with engine.connect() as connection:
            assert may_make_temporary_tables(connection, "espalier_scaler")
        engine.dispose()
