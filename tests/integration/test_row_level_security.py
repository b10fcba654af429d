"""The wall behind the tenant filter: PostgreSQL itself answers nothing across tenants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.exc import ProgrammingError

from core.db.base import Row
from core.db.models import File
from core.db.session import connect, service_transaction, tenant_transaction
from core.domain.ids import new_id
from core.services.files import NewFile, create_file
from tests.integration.conftest import Database, Tenant


@pytest.fixture
def api(database: Database) -> Iterator[Engine]:
    engine = connect(database.api_url)
    yield engine
    engine.dispose()


def add_file(engine: Engine, tenant: Tenant) -> None:
    new = NewFile(new_id(), "a.jsonl", "fine-tune", "k", 1, "0" * 64)
    with tenant_transaction(engine, tenant.id) as session:
        create_file(session, tenant.id, new=new)


def test_a_query_without_a_tenant_filter_sees_one_tenants_rows(
    api: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    add_file(api, tenant)
    for asker, expected in ((tenant, 1), (other_tenant, 0)):
        with tenant_transaction(api, asker.id) as session:
            assert session.scalar(select(func.count()).select_from(File)) == expected


def test_without_a_tenant_nothing_is_seen_even_on_a_connection_that_had_one(api: Engine, tenant: Tenant) -> None:
    add_file(api, tenant)
    with service_transaction(api) as session:
        assert session.scalar(select(func.count()).select_from(File)) == 0


def test_a_row_for_another_tenant_is_refused(api: Engine, tenant: Tenant, other_tenant: Tenant) -> None:
    new = NewFile(new_id(), "a.jsonl", "fine-tune", "k", 1, "0" * 64)
    with pytest.raises(ProgrammingError, match="row-level security"), tenant_transaction(api, tenant.id) as session:
        create_file(session, other_tenant.id, new=new)


# Tables without a tenant, and why: one list of bases for all (walled by the allow-list), operators, the schedules' leader,
# the workers, whose presence is no secret, where the bases' tokenizers are, how fast each base is, and how far the
# deletion of old rows has come.
SHARED_TABLES = {
    "base_models",
    "base_tokenizers",
    "operator_keys",
    "leaders",
    "pools",
    "workers",
    "retention_marks",
    "alembic_version",
}
ALLOWED_POLICIES = {
    "tenant_rows": {"espalier_api"},
    "own_key": {"espalier_api"},
    "allowed_rows": {"espalier_api"},
    "granted_rows": {"espalier_api"},
    "shared_rows": {"espalier_api"},
    "outlook_rows": {"espalier_outlook"},
    "operator_rows": {"espalier_operator"},
    "checked_rows": {"espalier_worker"},  # of bases, which are nobody's: what a worker found when it loaded one
    "service_rows": {"espalier_schedule,espalier_worker", "espalier_schedule"},
    "owner_rows": {"postgres"},
    "old_rows": {"espalier_schedule"},
}
# These take away from what the others allow: of histories the schedule deletes what is old, and nothing else.
NARROWING_POLICIES = {"old_rows"}
# What another tenant has granted, and what a queue's length is made of, may be looked at and no more.
READ_ONLY_POLICIES = {"allowed_rows", "granted_rows", "shared_rows", "outlook_rows"}


def tables_of(owner: Engine) -> dict[str, tuple[bool, bool]]:
    """Return for every table whether it has a tenant's column, and whether row-level security is forced on it."""
    query = text("""
        select c.relname, c.relrowsecurity and c.relforcerowsecurity, c.relname = 'tenants' or exists (
            select from pg_attribute a where a.attrelid = c.oid and a.attname = 'tenant_id' and not a.attisdropped)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where n.nspname = 'public' and c.relkind in ('r', 'p')
    """)
    with service_transaction(owner) as session:
        return {row[0]: (row[2], row[1]) for row in session.execute(query)}


def test_no_table_is_forgotten_it_has_a_tenant_and_a_wall_or_a_reason(owner: Engine) -> None:
    tables = tables_of(owner)
    assert set(tables) - {"alembic_version"} == set(Row.metadata.tables)
    assert {name for name, (is_owned, _) in tables.items() if not is_owned} == SHARED_TABLES
    assert {name for name, (is_owned, is_walled) in tables.items() if is_owned and not is_walled} == set()


def test_every_tenant_owned_table_shows_the_api_one_tenants_rows_and_takes_no_others(owner: Engine) -> None:
    query = text("""
        select tablename, policyname, array_to_string(array(select unnest(roles) order by 1), ',') as roles,
            cmd, permissive, qual, with_check
        from pg_policies where schemaname = 'public'
    """)
    with service_transaction(owner) as session:
        policies = session.execute(query).all()
    for policy in policies:
        assert policy.roles in ALLOWED_POLICIES[policy.policyname], policy
        assert policy.cmd == "SELECT" or policy.policyname not in READ_ONLY_POLICIES, policy
        is_narrowing = policy.policyname in NARROWING_POLICIES
        assert policy.permissive == ("RESTRICTIVE" if is_narrowing else "PERMISSIVE"), policy
    walls = {policy.tablename: policy for policy in policies if policy.policyname == "tenant_rows"}
    owned = {name for name, (is_owned, _) in tables_of(owner).items() if is_owned}
    assert set(walls) == owned
    for name, wall in walls.items():
        column = "id" if name == "tenants" else "tenant_id"
        own = f"({column} = (NULLIF(current_setting('app.tenant_id'::text, true), ''::text))::uuid)"
        assert own in wall.qual, name
        assert wall.qual == own or name == "api_keys"  # a key is looked up before its tenant is known
        assert wall.cmd == "ALL"
        assert wall.with_check in (own, "false"), name


def test_no_runtime_role_can_pass_the_wall(owner: Engine) -> None:
    query = text("select count(*) from pg_roles where rolname like 'espalier_%' and (rolsuper or rolbypassrls)")
    with service_transaction(owner) as session:
        assert session.scalar(query) == 0
