"""Transactions begin with an identity in one round trip, on live connections."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from core.db.migrate import RoleLogin, migrate_database
from core.db.session import DATABASE_ERRORS, connect, operator_transaction, service_transaction, tenant_transaction
from tests.databases import Database
from tests.factories.tenants import Tenant

SETTINGS = text("select current_setting('app.tenant_id', true), current_setting('app.actor', true)")


@pytest.fixture
def api(database: Database) -> Iterator[Engine]:
    engine = connect(database.api_url, pool_size=1)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("actor", ["", "key:abc", 'it\'s \\ "quoted"; select 1 --', "\N{SNOWMAN} %s :name"])
def test_an_identity_is_told_as_it_is_and_ends_with_the_transaction(api: Engine, tenant: Tenant, actor: str) -> None:
    with tenant_transaction(api, tenant.id, actor=actor) as session:
        assert session.execute(SETTINGS).one() == (str(tenant.id), actor)
    with api.connect() as connection:
        assert set(connection.execute(SETTINGS).one()) <= {"", None}


def test_a_savepoint_and_what_follows_a_rollback_are_of_the_same_tenant(api: Engine, tenant: Tenant) -> None:
    with tenant_transaction(api, tenant.id, actor="a") as session:
        with session.begin_nested():
            assert session.execute(SETTINGS).one() == (str(tenant.id), "a")
        session.rollback()
        assert session.execute(SETTINGS).one() == (str(tenant.id), "a")


def test_connections_that_died_at_rest_are_replaced(
    api: Engine, owner: Engine, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.db.session._REST_SECONDS", 0.0)  # any rest is a long one

    def ask() -> int:
        with tenant_transaction(api, tenant.id, actor="a") as session:
            return int(session.scalars(text("select pg_backend_pid()")).one())

    first = ask()
    with owner.begin() as connection:
        assert connection.scalar(text("select pg_terminate_backend(:pid, 60000)"), {"pid": first}), "it still lives"
    assert ask() != first


def test_a_role_that_may_not_be_taken_is_refused_in_the_databases_own_words(database: Database) -> None:
    engine = connect(database.schedule_url)
    with (
        pytest.raises(ProgrammingError, match="permission denied to set role"),
        operator_transaction(engine, actor="a") as session,
    ):
        session.execute(text("select 1"))
    with engine.connect() as connection:
        assert connection.execute(text("select 1")).scalar() == 1
    engine.dispose()


def end_connections(owner: Engine) -> None:
    """End the API's connections to this database: the server is shared with other modules'."""
    found = "from pg_stat_activity where usename = 'espalier_api' and datname = current_database()"
    with service_transaction(owner) as session:
        session.execute(text(f"select pg_terminate_backend(pid) {found}"))


def identity(engine: Engine, tenant: Tenant, actor: str) -> tuple[str, str]:
    with tenant_transaction(engine, tenant.id, actor=actor) as session:
        tenant_id, told_actor = session.execute(SETTINGS).one()
        return tenant_id, told_actor


def test_a_connection_ended_a_moment_ago_is_an_error_that_may_be_tried_again(
    api: Engine, owner: Engine, tenant: Tenant
) -> None:
    identity(api, tenant, "before")
    end_connections(owner)
    try:
        found = identity(api, tenant, "at once")
    except DATABASE_ERRORS:
        found = identity(api, tenant, "at once")
    assert found == (str(tenant.id), "at once")


def test_a_connection_ended_inside_a_transaction_is_an_error_that_may_be_tried_again(
    api: Engine, owner: Engine, tenant: Tenant
) -> None:
    with pytest.raises(DATABASE_ERRORS), tenant_transaction(api, tenant.id) as session:
        session.execute(text("select 1"))
        end_connections(owner)
        session.execute(text("select 1"))
    assert identity(api, tenant, "after") == (str(tenant.id), "after")


REFUSED = {
    "a parameter": ("select no_such_function(:value)", "42883"),
    "a value of the wrong type": ("select cast(:value as integer)", "22P02"),
    "a key that is there": ("insert into words values (:value), (:value)", "23505"),
    "a row that may not be": ("insert into words values (:value || :value)", "23514"),
    "a row without a value": ("insert into words select nullif(:value, :value)", "23502"),
}


@pytest.mark.parametrize(("statement", "sqlstate"), REFUSED.values(), ids=REFUSED.keys())
def test_no_text_of_an_error_holds_a_value_and_all_of_them_name_the_statement(
    owner: Engine, statement: str, sqlstate: str
) -> None:
    value = "hush" + uuid.uuid4().hex[:4]  # a traceback shows this line, so that it must not hold the value
    with pytest.raises(DBAPIError) as caught, service_transaction(owner) as session:
        session.execute(text("create temporary table words (word text primary key check (length(word) < 9))"))
        session.execute(text(statement), {"value": value})
    told = "".join(traceback.format_exception(caught.value))
    assert value not in told
    assert statement.partition(":")[0] in told
    assert caught.value.orig is not None
    assert caught.value.orig.sqlstate == sqlstate  # type: ignore[attr-defined]


def test_the_statement_that_lets_a_role_in_does_not_hold_its_password(database: Database) -> None:
    with pytest.raises(DBAPIError) as caught:
        migrate_database(database.owner_url, logins=(RoleLogin("no_such_role", "hush-78"),))
    assert "no_such_role" in str(caught.value)
    assert "hush-78" not in str(caught.value)
