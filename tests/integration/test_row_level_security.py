"""Row-level security, behind the tenant filter: PostgreSQL itself shows nothing of another tenant."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.exc import ProgrammingError

from core.db.base import Row
from core.db.models import File
from core.db.session import auditor_transaction, connect, service_transaction, tenant_transaction
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.services.files import create_file
from core.services.visibility import HiddenRowsError, require_sight
from tests.clusters import OWNER
from tests.databases import Database
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction


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
    "owner_rows": {OWNER.role},
    "old_rows": {"espalier_schedule"},
    "deleted_rows": {"espalier_schedule"},
    "marked_rows": {OWNER.role},  # by which its own functions see what is marked as deleted
    "reader_rows": {"espalier_auditor,espalier_backup"},
}
# These take away from what the others allow: of histories the schedule deletes what is old, and nothing else.
NARROWING_POLICIES = {"old_rows", "deleted_rows"}
# What another tenant has granted, what a queue's length is made of, and all that is audited, may be looked at and no more.
READ_ONLY_POLICIES = {"allowed_rows", "granted_rows", "shared_rows", "outlook_rows", "reader_rows"}
READERS = ("espalier_auditor", "espalier_backup")


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


@pytest.mark.parametrize("role", READERS)
def test_auditors_and_backups_see_every_row_of_every_table_and_change_none(owner: Engine, role: str) -> None:
    query = text("""
        select table_name || ': ' || privilege_type from information_schema.role_table_grants
        where grantee = :role and privilege_type <> 'SELECT'
    """)
    with any_role_transaction(owner) as session:
        session.execute(text(f"set local role {role}"))
        require_sight(session)  # fails for a new table whose migration did not call let_readers_in
        assert session.scalars(query, {"role": role}).all() == []


def test_backups_read_where_every_sequence_is(owner: Engine) -> None:
    query = text("""
        select relname from pg_class where relnamespace = 'public'::regnamespace
          and case when relkind = 'S' then not has_sequence_privilege('espalier_backup', oid, 'select') end
    """)
    with service_transaction(owner) as session:
        assert session.scalars(query).all() == []


def test_the_owner_sees_no_tenants_file_until_it_becomes_the_auditor(
    database: Database, api: Engine, tenant: Tenant
) -> None:
    add_file(api, tenant)
    engine = connect(database.owner_url)
    count = text("select count(*) from files where tenant_id = :id")
    with any_role_transaction(engine) as session, pytest.raises(HiddenRowsError, match="does not see every row of"):
        assert session.scalar(count, {"id": tenant.id}) == 0
        require_sight(session)
    with auditor_transaction(engine) as session:
        assert session.scalar(count, {"id": tenant.id}) == 1
    engine.dispose()
