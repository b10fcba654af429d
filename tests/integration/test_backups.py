"""A dump by the backup's role, as in docs/running.md, has every row, and an owner that is no superuser restores it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from core.db.migrate import migrate_database
from local.binaries import find_postgres
from tests.clusters import OWNER, Clusters, make_database, starting_postgres, superuser_url_of
from tests.integration.histories import upgrade_with_rows

# What a dump must bring back beside rows, each as what it is called and what is said of it.
CATALOGUE = {
    "owners": """
        select c.relname, pg_get_userbyid(c.relowner), c.relrowsecurity, c.relforcerowsecurity from pg_class c
        where c.relnamespace = 'public'::regnamespace order by 1""",
    "policies": "select tablename, policyname, cmd, roles::text, qual, with_check from pg_policies order by 1, 2",
    "grants": """
        select c.relname, a.attname, acl.grantee::regrole::text, acl.privilege_type
        from pg_class c left join pg_attribute a on a.attrelid = c.oid and a.attacl is not null
        cross join aclexplode(coalesce(a.attacl, c.relacl)) acl
        where c.relnamespace = 'public'::regnamespace order by 1, 2, 3, 4""",
    "functions": """
        select p.oid::regprocedure::text, pg_get_userbyid(p.proowner), p.proacl::text, pg_get_functiondef(p.oid)
        from pg_proc p where p.pronamespace = 'public'::regnamespace order by 1""",
    "triggers": "select tgrelid::regclass::text, pg_get_triggerdef(oid) from pg_trigger where not tgisinternal order by 1, 2",
    "constraints": """
        select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint
        where connamespace = 'public'::regnamespace order by 1, 2""",
    "sequences": "select sequencename, last_value from pg_sequences where schemaname = 'public' order by 1",
}


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Clusters]:
    with starting_postgres(tmp_path / "first") as start:
        yield start


@pytest.fixture
def other_clusters(tmp_path: Path) -> Iterator[Clusters]:
    with starting_postgres(tmp_path / "second") as start:
        yield start


def find_tools(major: int) -> Path:
    """Return where `pg_dump` of a major version is."""
    system = Path(f"/usr/lib/postgresql/{major}/bin")
    found = find_postgres() if major == 18 else system
    if not (found / "pg_dump").exists():
        pytest.skip(f"pg_dump {major} is not on this machine")
    return found


def run_tool(tools: Path, name: str, *arguments: str, url: str) -> None:
    subprocess.run([str(tools / name), *arguments, f"--dbname={url}"], check=True)


def contents_of(superuser_url: str) -> dict[str, list[Any]]:
    """Return every row of every table, and what the catalogue says."""
    with psycopg.connect(superuser_url) as superuser:
        tables = superuser.execute("select tablename from pg_tables where schemaname = 'public'").fetchall()
        query = sql.SQL("select to_jsonb(t)::text from {} t order by 1")
        rows = {name: superuser.execute(query.format(sql.Identifier(name))).fetchall() for (name,) in tables}
        return rows | {name: superuser.execute(query.encode()).fetchall() for name, query in CATALOGUE.items()}


@pytest.mark.parametrize("major", [15, 18])
def test_what_an_owner_dumps_as_the_backups_role_it_restores_elsewhere_row_by_row(
    clusters: Clusters, other_clusters: Clusters, tmp_path: Path, major: int
) -> None:
    tools, dump = find_tools(major), tmp_path / "espalier.dump"
    lost, new = make_database(clusters(major), OWNER), make_database(other_clusters(major), OWNER)
    upgrade_with_rows(lost, superuser_url_of(clusters(major), lost))
    before = contents_of(superuser_url_of(clusters(major), lost))

    options = ("--format=custom", "--role=espalier_backup", "--enable-row-security", f"--file={dump}")
    run_tool(tools, "pg_dump", *options, url=lost)

    migrate_database(new)
    with psycopg.connect(new, autocommit=True) as owner:
        owner.execute("grant create on schema public to espalier_outlook")
        options = ("--clean", "--if-exists", "--exit-on-error", "--single-transaction")
        run_tool(tools, "pg_restore", *options, str(dump), url=new)
        owner.execute("revoke create on schema public from espalier_outlook")

    after = contents_of(superuser_url_of(other_clusters(major), new))
    assert [name for name in before if before[name] != after[name]] == []
    assert [name for name, rows in before.items() if not rows] == []
