"""Every command on an unusable database: one line, what to do, and an exit code that is not 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from alembic import command
from psycopg import sql
from sqlalchemy import Engine
from typer.testing import CliRunner

from cli.main import app
from core.db.migrate import RoleLogin, login_url
from local.ports import free_ports
from local.servers import ServerAddresses
from tests.clusters import OWNER, make_database
from tests.databases import Database
from tests.factories.tenants import Tenant
from tests.integration.commands.invocations import invocations, names_of_commands
from tests.integration.histories import move

SECRET = "hush-78"
STRANGER = RoleLogin("tests_stranger", SECRET)
# These ask no database.
ELSEWHERE = {"up", "down", "status", "demo", "validate", "bucket create", "s3-check"}
# This prints a line for each thing that it looks at.
LISTING = {"doctor"}


@pytest.fixture(scope="module")
def stranger(servers: ServerAddresses) -> Iterator[RoleLogin]:
    """A role that may log in and nothing else."""
    role = sql.Identifier(STRANGER.role)
    with psycopg.connect(servers.postgres_url, autocommit=True) as superuser:
        superuser.execute(sql.SQL("create role {} login password {}").format(role, sql.Literal(SECRET)))
        yield STRANGER
        superuser.execute(sql.SQL("drop role {}").format(role))


@pytest.fixture(scope="module")
def empty(servers: ServerAddresses) -> str:
    return make_database(servers.postgres_url, OWNER)


@pytest.fixture(scope="module")
def old(servers: ServerAddresses) -> str:
    url = make_database(servers.postgres_url, OWNER)
    move(url, command.upgrade, "0005")
    return url


@pytest.fixture(scope="module")
def unknown(servers: ServerAddresses) -> str:
    """A database that a newer version has migrated."""
    url = make_database(servers.postgres_url, OWNER)
    move(url, command.upgrade, "head")
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute("update alembic_version set version_num = '9999'")
    return url


@pytest.fixture
def read_only(database: Database) -> Iterator[str]:
    name = sql.Identifier(database.owner_url.rpartition("/")[2])
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute(sql.SQL("alter database {} set default_transaction_read_only = on").format(name))
        yield database.owner_url
        superuser.execute("set default_transaction_read_only = off")
        superuser.execute(sql.SQL("alter database {} reset default_transaction_read_only").format(name))


@pytest.fixture
def refusals(
    env: dict[str, str], owner: Engine, tenant: Tenant, tmp_path: Path
) -> Callable[[str], dict[str, tuple[int, str]]]:
    """What runs every command on a database, and returns its exit code and what it said where it failed."""
    called = invocations(tmp_path, owner, tenant)
    assert set(called) == names_of_commands(), "call the new command in invocations"

    def run(url: str) -> dict[str, tuple[int, str]]:
        found = {}
        for name in sorted(set(called) - ELSEWHERE, key=lambda name: (name == "migrate", name)):  # which mends a schema
            words = [*name.split(), *called[name]]
            done = CliRunner().invoke(app, words, env=env | {"ESPALIER_OWNER_DATABASE_URL": url})
            assert done.exception is None or isinstance(done.exception, SystemExit), (name, done.exception)
            assert SECRET not in done.output, name
            if done.exit_code and name not in LISTING:
                assert (done.stdout, len(done.stderr.splitlines())) == ("", 1), (name, done.output)
            found[name] = (done.exit_code, done.output)
        return found

    return run


Refusals = Callable[[str], dict[str, tuple[int, str]]]


def assert_all_say(
    found: dict[str, tuple[int, str]], *told: str, but: frozenset[str] = frozenset(), status: int = 1
) -> None:
    for name in sorted(set(found) - LISTING - but):
        exit_code, said = found[name]
        assert exit_code == (2 if name == "check-contract" else status), (name, said)
        assert any(each in said for each in told), (name, said)
    for name in LISTING:
        assert found[name][0] == 1


# It fails at the files that it is given, before it asks a database.
FIRST_LOOKS_AT_FILES = frozenset({"base-models add"})


@pytest.mark.parametrize(
    "url",
    [
        f"no-url-{SECRET}",
        f"mysql://u:{SECRET}@127.0.0.1/d",
        f"postgresql://u:{SECRET}@127.0.0.1:{SECRET}/d",
    ],
)
def test_a_url_that_is_none_is_named(refusals: Refusals, url: str) -> None:
    assert_all_say(
        refusals(url),
        "ESPALIER_OWNER_DATABASE_URL (Value error, This is no URL of a database",
        but=FIRST_LOOKS_AT_FILES,
        status=2,
    )


def test_a_database_that_is_away_is_named(refusals: Refusals) -> None:
    (port,) = free_ports(1)
    found = refusals(f"postgresql://postgres:{SECRET}@127.0.0.1:{port}/espalier")
    assert_all_say(found, "The database does not answer", but=FIRST_LOOKS_AT_FILES)


def test_a_wrong_password_is_named(refusals: Refusals, database: Database) -> None:
    found = refusals(login_url(database.owner_url, RoleLogin(OWNER.role, SECRET)))
    assert_all_say(found, "password authentication failed", but=FIRST_LOOKS_AT_FILES)


def test_a_login_that_is_not_the_owner_is_told_who_must_ask(
    refusals: Refusals, database: Database, stranger: RoleLogin
) -> None:
    found = refusals(login_url(database.owner_url, stranger))
    assert_all_say(found, "Name the owner that `espalier migrate` ran as", but=FIRST_LOOKS_AT_FILES)


def test_a_runtime_role_is_told_who_must_ask(refusals: Refusals, database: Database) -> None:
    found = refusals(database.scaler_url)
    assert_all_say(found, "Name the owner that `espalier migrate` ran as", but=FIRST_LOOKS_AT_FILES)


def test_a_schema_that_is_missing_is_told_to_be_made(refusals: Refusals, empty: str) -> None:
    found = refusals(empty)
    assert_all_say(found, "Run `espalier migrate`", but=FIRST_LOOKS_AT_FILES | {"migrate"})


@pytest.mark.usefixtures("servers")
def test_a_schema_that_is_old_is_told_to_be_migrated(refusals: Refusals, old: str) -> None:
    found = refusals(old)
    assert_all_say(found, "Run `espalier migrate`", "run it with this version", but=FIRST_LOOKS_AT_FILES | {"migrate"})


def test_a_schema_that_is_newer_is_not_migrated(refusals: Refusals, unknown: str) -> None:
    exit_code, said = refusals(unknown)["migrate"]
    assert (exit_code, "newer version" in said) == (1, True), said


def test_a_database_that_only_reads_is_told_of_by_what_would_write(refusals: Refusals, read_only: str) -> None:
    found = refusals(read_only)
    writing = {name for name in found if name.split()[-1] in ("create", "set", "disable", "enable", "revoke", "rotate")}
    for name in writing:
        assert found[name][0] == 1, name
        assert "name the primary" in found[name][1], name


def test_a_check_of_the_contract_that_does_not_see_every_row_says_so_and_judges_nothing(
    env: dict[str, str], database: Database
) -> None:
    policy = "create policy reader_rows on adapters for select to espalier_auditor, espalier_backup using (true)"
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("drop policy reader_rows on adapters")
        done = CliRunner().invoke(app, ["check-contract"], env=env)
        superuser.execute(policy)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "The check could not begin: espalier_auditor does not see every row of adapters. Run `espalier migrate`.\n"
    )
