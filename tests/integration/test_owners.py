"""An owner that is no superuser, as on a managed PostgreSQL, can do all an owner must, from PostgreSQL 15 to 18."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from alembic import command
from psycopg import sql
from sqlalchemy import text
from typer.testing import CliRunner

from cli.main import app
from core.db.migrate import RoleLogin, login_url, migrate_database
from core.db.roles import ROLES
from core.db.session import auditor_transaction, connect
from core.services.promises import check_rows
from core.services.tenants import find_tenant
from core.services.visibility import require_sight
from core.settings import FairnessSettings
from local.servers import ServerAddresses
from tests.clusters import (
    OWNER,
    PASSWORD,
    Clusters,
    make_database,
    make_owner,
    running_postgres,
    starting_postgres,
    superuser_url_of,
)
from tests.factories.bases import REGISTRY
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.integration.histories import TENANTS, move, upgrade_with_rows
from tests.processes import storage_settings
from tests.sessions import any_role_transaction

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    with starting_postgres(tmp_path_factory.mktemp("clusters")) as start:
        yield start


# From the first migration to the newest, and back, over rows


# What a clock, a random number or the owner's name decides.
UNSTEADY = (
    "id", "created_at", "published_at", "state_since", "run_after", "started_at", "heartbeat_at", "actor", "before",
    "after", "subject", "checkpoint_id", "attempt_id",
)  # fmt: skip


def rows_of(superuser_url: str) -> dict[str, list[Any]]:
    """Return what is in every table, in an order that depends on nothing else."""
    with psycopg.connect(superuser_url) as superuser:
        tables = superuser.execute("select tablename from pg_tables where schemaname = 'public'").fetchall()
        query = "select (to_jsonb(t) - %s::text[])::text from {} t order by 1"
        return {
            table: superuser.execute(sql.SQL(query).format(sql.Identifier(table)), [list(UNSTEADY)]).fetchall()
            for (table,) in tables
        }


@pytest.mark.parametrize("major", [15, 18])
def test_migrations_do_the_same_to_rows_for_an_owner_and_for_a_superuser(clusters: Clusters, major: int) -> None:
    cluster, found = clusters(major), []
    for login in (OWNER, None):  # in this order, so that the roles are the owner's
        owner_url = make_database(cluster, login)
        superuser_url = superuser_url_of(cluster, owner_url)
        upgrade_with_rows(owner_url, superuser_url)
        found.append(rows_of(superuser_url))
        assert [name for name, rows in found[-1].items() if not rows] == []
        engine = connect(owner_url)
        with auditor_transaction(engine) as session:
            require_sight(session)
            assert [each for each in check_rows(session, FairnessSettings().fairness_terms) if each.num_broken] == []
            assert session.scalar(text("select count(*) from tenants")) == len(TENANTS)
        engine.dispose()
        move(owner_url, command.downgrade, "0001")
        found.append(rows_of(superuser_url))
    by_owner, back_by_owner, by_superuser, back_by_superuser = found
    assert by_owner == by_superuser
    assert back_by_owner == back_by_superuser


# The commands


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    path = tmp_path / "registry.yaml"
    path.write_text(yaml.safe_dump(REGISTRY))
    return path


def environment(owner_url: str, servers: ServerAddresses) -> dict[str, str]:
    passwords = {f"ESPALIER_{name}_PASSWORD": PASSWORD for name in ("API", "WORKER", "SCHEDULE", "SCALER")}
    return passwords | {
        "ESPALIER_OWNER_DATABASE_URL": owner_url,
        **storage_settings(servers.storage),
    }


@pytest.mark.parametrize(
    ("major", "login"),
    [(15, OWNER), (16, OWNER), (17, OWNER), (18, OWNER), (18, None)],
    ids=lambda value: str(value) if isinstance(value, int) else "owner" if value else "superuser",
)
def test_an_owner_migrates_makes_tenants_and_checks_the_contract_of_all_of_them(
    clusters: Clusters, servers: ServerAddresses, registry: Path, major: int, login: RoleLogin | None, tmp_path: Path
) -> None:
    with starting_postgres(tmp_path) as start:  # a superuser's roles are not for the owners of the other tests
        cluster = (clusters if login else start)(major)
        check_an_owner(cluster, make_database(cluster, login), servers, registry)


def check_an_owner(cluster: str, owner_url: str, servers: ServerAddresses, registry: Path) -> None:

    def espalier(*words: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(app, [*words, "--json"], env=environment(owner_url, servers), catch_exceptions=False)
        assert "error" not in done.stdout, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    for _ in range(2):  # the second time over roles of its own
        espalier("migrate", "--registry", str(registry))
    slugs = [espalier("tenants", "create", slug)[0]["tenant"] for slug in ("acme", "other")]
    superuser = connect(superuser_url_of(cluster, owner_url))
    with any_role_transaction(superuser) as session:
        tenants = [Tenant(find_tenant(session, slug).id, slug, "", "") for slug in slugs]
    for tenant in tenants:
        queue_job(superuser, tenant)
    superuser.dispose()
    findings = {each["promise"]: each for each in espalier("check-contract")}
    assert findings["I1"]["num_checked"] == len(tenants)
    assert {name for name, each in findings.items() if each["num_broken"]} == {"I7"}  # the files have no objects


@pytest.mark.parametrize("major", [15, 18])
def test_a_second_owner_on_one_server_needs_the_first_ones_roles_with_admin_option(
    clusters: Clusters, registry: Path, servers: ServerAddresses, major: int
) -> None:
    first = make_database(clusters(major), OWNER)
    migrate_database(first)
    second = make_database(clusters(major), RoleLogin("tests_second_owner", PASSWORD))
    migrate = ("migrate", "--registry", str(registry))
    env = environment(second, servers)
    if major >= 16:  # before, whoever may make roles may hand out all that are no superuser's
        refused = CliRunner().invoke(app, migrate, env=env)
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1), refused.output
        assert "docs/operations.md" in refused.stderr
        with psycopg.connect(first, autocommit=True) as owner:
            owner.execute(f"grant {', '.join(ROLES)} to tests_second_owner with admin option".encode())
    for words in (migrate, ("tenants", "create", "acme")):
        done = CliRunner().invoke(app, words, env=env)
        assert done.exit_code == 0, done.output
    engine = connect(second)
    with auditor_transaction(engine) as session:
        require_sight(session)
    engine.dispose()


@pytest.mark.parametrize("major", [15, 18])
def test_the_administrator_of_a_managed_server_makes_the_owner_as_documented(tmp_path: Path, major: int) -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    (statements,) = re.findall(r"\n\n((?:    create role espalier_owner.*\n)(?:    .+\n)+)", page)
    administrator = RoleLogin("tests_administrator", PASSWORD)
    with running_postgres(tmp_path / "postgres", major) as url:
        server = url.rpartition("/")[0]
        with psycopg.connect(f"{server}/postgres", autocommit=True) as superuser:
            superuser.execute("drop database espalier")
            make_owner(superuser, administrator)
            superuser.execute("alter role tests_administrator createdb")
        with psycopg.connect(login_url(f"{server}/postgres", administrator), autocommit=True) as connection:
            for statement in statements.replace("...", PASSWORD).splitlines():
                connection.execute(statement.encode())
        migrate_database(login_url(f"{server}/espalier", RoleLogin("espalier_owner", PASSWORD)))
