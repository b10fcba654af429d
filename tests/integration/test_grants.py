"""The rights of each database role, verb by verb: as few as possible, and no role has a dangerous one."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

from core.db.session import connect, service_transaction
from tests.databases import Database
from tests.factories.bases import BASE_MODEL

ROLES = ("espalier_api", "espalier_operator", "espalier_worker", "espalier_schedule", "espalier_scaler")
# Verbs by role on the tables that decide who may do what, or that must not be rewritten. "update" may be of columns only.
EXACTLY = {
    "api_keys": {
        "espalier_api": "insert select update",
        "espalier_operator": "insert select update",
        "espalier_schedule": "delete select",
    },
    "operator_keys": {"espalier_operator": "insert select update"},
    "audit_entries": {"espalier_api": "select", "espalier_operator": "select"},
    "base_models": {
        "espalier_api": "select",
        "espalier_operator": "select update",
        "espalier_worker": "select update",
        "espalier_schedule": "select",
    },
    "pool_demand": {"espalier_operator": "select", "espalier_scaler": "select"},
    "operator_jobs": {"espalier_operator": "select"},
    "operator_usage": {"espalier_operator": "select"},
    "tenants": {
        "espalier_api": "select",
        "espalier_operator": "insert select update",
        "espalier_worker": "select update",
        "espalier_schedule": "select update",
    },
}
COLUMNS = {
    ("espalier_api", "api_keys"): {"revoked_at", "last_used_at"},
    ("espalier_operator", "api_keys"): {"revoked_at"},
    ("espalier_operator", "operator_keys"): {"revoked_at", "last_used_at"},
    ("espalier_operator", "base_models"): {"disabled_at"},
    ("espalier_worker", "base_models"): {"state", "state_reason", "state_since", "checked_by"},
    ("espalier_worker", "tenants"): {"usage", "lift", "usage_at"},
    ("espalier_schedule", "tenants"): {"usage", "lift", "usage_at", "erased_at"},
}
# A history is added to, never rewritten; and nobody deletes what others stand on, but for what is old or deleted, by the schedule.
NEVER = {
    "events": {"update", "delete"},
    "usage": {"delete"},
    "audit_entries": {"insert", "update", "delete"},
    "tenants": {"delete"},
    "jobs": {"delete"},
    "files": {"delete"},
    "api_keys": {"delete"},
    "adapters": {"delete"},
}
# retention/ and erasure/ show what row-level security leaves of it.
DELETES_OLD_ROWS = {("espalier_schedule", table) for table in ("events", "jobs", "adapters", "files", "api_keys")}
# The operator's role is for settings; the worker's and the schedule's have no business with keys.
NOT_THE_OPERATORS = ("files", "jobs", "events", "metrics", "checkpoints", "adapters", "attempts", "usage")


@pytest.fixture(scope="module")
def verbs(owner: Engine) -> dict[tuple[str, str], set[str]]:
    query = text("""
        select r.role, c.relname, v.verb from unnest(cast(:roles as text[])) r (role)
        cross join pg_class c join pg_namespace n on n.oid = c.relnamespace and n.nspname = 'public'
        cross join unnest(array['select', 'insert', 'update', 'delete', 'truncate', 'references', 'trigger']) v (verb)
        where c.relkind in ('r', 'p', 'v', 'm') and (has_table_privilege(r.role, c.oid, v.verb) or (
            v.verb in ('select', 'insert', 'update') and has_any_column_privilege(r.role, c.oid, v.verb)))
    """)
    found: dict[tuple[str, str], set[str]] = {}
    with service_transaction(owner) as session:
        for role, table, verb in session.execute(query, {"roles": list(ROLES)}):
            found.setdefault((role, table), set()).add(verb)
    return found


@pytest.mark.parametrize("table", sorted(EXACTLY))
def test_the_tables_of_rights_are_open_exactly_as_far_as_needed(
    verbs: dict[tuple[str, str], set[str]], table: str
) -> None:
    granted = {role: " ".join(sorted(verbs[role, table])) for role in ROLES if (role, table) in verbs}
    assert granted == EXACTLY[table]


@pytest.mark.parametrize(("role", "table"), sorted(COLUMNS))
def test_an_update_is_of_those_columns_only(owner: Engine, role: str, table: str) -> None:
    query = text("""
        select column_name from information_schema.column_privileges
        where grantee = :role and table_name = :table and privilege_type = 'UPDATE'
    """)
    with service_transaction(owner) as session:
        assert set(session.scalars(query, {"role": role, "table": table})) == COLUMNS[role, table]


def test_no_runtime_role_rewrites_a_history_or_empties_a_table(verbs: dict[tuple[str, str], set[str]]) -> None:
    for (role, table), granted in verbs.items():
        assert not granted & {"truncate", "references", "trigger"}, (role, table)
        allowed = {"delete"} if (role, table) in DELETES_OLD_ROWS else set()
        assert not granted & NEVER.get(table, set()) - allowed, (role, table)


def test_the_operators_role_reads_nothing_that_tenants_own(verbs: dict[tuple[str, str], set[str]]) -> None:
    assert not [table for table in NOT_THE_OPERATORS if ("espalier_operator", table) in verbs]


def test_the_scalers_role_reads_the_demand_of_pools_and_nothing_else(
    database: Database, owner: Engine, verbs: dict[tuple[str, str], set[str]]
) -> None:
    assert {table: granted for (role, table), granted in verbs.items() if role == "espalier_scaler"} == {
        "pool_demand": {"select"}
    }
    callable_as_others = text("""
        select p.proname from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        where n.nspname = 'public' and p.prosecdef and has_function_privilege('espalier_scaler', p.oid, 'execute')
    """)
    with service_transaction(owner) as session:
        assert session.scalars(callable_as_others).all() == ["count_pool_demand"]
        tables = session.scalars(text("select tablename from pg_tables where schemaname = 'public'")).all()
    scaler = connect(database.scaler_url)
    try:
        with service_transaction(scaler) as session:
            wanted = session.execute(text("select pool, workers_wanted from pool_demand order by pool")).all()
        assert [tuple(row) for row in wanted] == [(f"{BASE_MODEL}@nf4", 0), (f"{BASE_MODEL}@none", 0)]
        for name in (*tables, "operator_jobs", "operator_usage"):
            with pytest.raises(ProgrammingError, match="permission denied"), service_transaction(scaler) as session:
                session.execute(text(f"select count(*) from {name}"))
    finally:
        scaler.dispose()


def test_every_function_that_runs_as_its_owner_looks_last_into_temporary_tables(owner: Engine) -> None:
    query = text("""
        select p.proname, (select option from unnest(p.proconfig) option where option like 'search_path=%') as path
        from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname = 'public' and p.prosecdef
    """)
    with service_transaction(owner) as session:
        found = {row.proname: row.path for row in session.execute(query)}
    assert set(found) >= {"record_change", "count_pool_demand", "queue_outlook"}
    assert not {name: path for name, path in found.items() if not str(path).endswith(", pg_temp")}


def test_a_temporary_view_in_the_place_of_a_table_is_not_evaluated_as_the_functions_owner(
    database: Database, owner: Engine
) -> None:
    with service_transaction(owner) as session:  # as it is where the database belongs to somebody else
        name = session.scalar(text("select current_database()"))
        session.execute(text(f'grant temporary on database "{name}" to espalier_scaler'))
    scaler = connect(database.scaler_url)
    try:
        with service_transaction(scaler) as session:
            before = session.execute(text("select * from pool_demand order by pool")).all()
            for statement in SHADOWS:
                session.execute(text(statement))
            with pytest.raises(ProgrammingError, match="permission denied"), session.begin_nested():
                session.execute(text("select count(*) from public.jobs"))
            assert session.execute(text("select * from pool_demand order by pool")).all() == before
    finally:
        scaler.dispose()


# What the function reads `jobs` for, from a view that ends the statement with the name of the role it runs as.
SHADOWS = (
    """
    create function pg_temp.leak() returns text language plpgsql as $$
    begin
        raise exception 'ran as %', current_user;
    end $$
    """,
    """
    create temporary view jobs as select pg_temp.leak() as pool, pg_temp.leak() as status, null::uuid as id,
        null::uuid as tenant_id, now() as run_after
    """,
    "grant select on pg_temp.jobs to public",
)


def test_the_views_of_operators_show_no_column_that_holds_a_tenants_words(owner: Engine) -> None:
    query = text(
        "select column_name from information_schema.columns where table_name in ('operator_jobs', 'operator_usage')"
    )
    with service_transaction(owner) as session:
        shown = set(session.scalars(query))
    assert not shown & {
        "suffix",
        "metadata",
        "spec",
        "error",
        "fine_tuned_model",
        "training_file_id",
        "validation_file_id",
    }


def test_no_runtime_role_owns_makes_or_becomes_anything(owner: Engine) -> None:
    with service_transaction(owner) as session:
        owned = text(
            "select count(*) from pg_class c join pg_roles r on r.oid = c.relowner where r.rolname = any(:roles)"
        )
        assert session.scalar(owned, {"roles": list(ROLES)}) == 0
        powers = text("""
            select count(*) from pg_roles where rolname = any(:roles)
            and (rolsuper or rolbypassrls or rolcreaterole or rolcreatedb or rolreplication)
        """)
        assert session.scalar(powers, {"roles": list(ROLES)}) == 0
        assert session.scalar(text("select rolcanlogin from pg_roles where rolname = 'espalier_operator'")) is False
        schema = text(
            "select count(*) from unnest(cast(:roles as text[])) r (role) where has_schema_privilege(role, 'public', 'create')"
        )
        assert session.scalar(schema, {"roles": list(ROLES)}) == 0
        members = text("""
            select m.rolname || ' in ' || g.rolname from pg_auth_members a
            join pg_roles m on m.oid = a.member join pg_roles g on g.oid = a.roleid where m.rolname = any(:roles)
        """)
        assert session.scalars(members, {"roles": list(ROLES)}).all() == ["espalier_api in espalier_operator"]
