"""The wall behind the tenant filter: PostgreSQL itself answers nothing across tenants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.exc import ProgrammingError

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


def test_every_tenant_owned_table_forces_row_level_security(owner: Engine) -> None:
    query = text("""
        select c.relname, c.relrowsecurity and c.relforcerowsecurity from pg_class c
        join pg_namespace n on n.oid = c.relnamespace
        where n.nspname = 'public' and c.relkind = 'r' and (c.relname = 'tenants' or exists (
            select from pg_attribute a where a.attrelid = c.oid and a.attname = 'tenant_id'))
    """)
    with service_transaction(owner) as session:
        walls = {row[0]: row[1] for row in session.execute(query)}
    assert len(walls) >= 11
    assert all(walls.values()), walls


def test_no_runtime_role_can_pass_the_wall(owner: Engine) -> None:
    query = text("select count(*) from pg_roles where rolname like 'espalier_%' and (rolsuper or rolbypassrls)")
    with service_transaction(owner) as session:
        assert session.scalar(query) == 0
