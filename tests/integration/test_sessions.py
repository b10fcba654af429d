"""Transactions begin with their identity in one round trip, and a connection that has died is never met as a surprise."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from core.db.session import DATABASE_ERRORS, connect, service_transaction, tenant_transaction
from tests.integration.conftest import Database, Tenant


@pytest.fixture
def api(database: Database) -> Iterator[Engine]:
    engine = connect(database.api_url, pool_size=1)
    yield engine
    engine.dispose()


def end_connections(owner: Engine) -> None:
    with service_transaction(owner) as session:
        session.execute(text("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'espalier_api'"))


def identity(engine: Engine, tenant: Tenant, actor: str) -> tuple[str, str]:
    with tenant_transaction(engine, tenant.id, actor=actor) as session:
        query = text("select current_setting('app.tenant_id'), current_setting('app.actor')")
        row = session.execute(query).one()
        return row[0], row[1]


@pytest.mark.parametrize(
    "actor",
    [
        "key abc",
        "",
        "it's",
        "'); select pg_sleep(9); --",
        "back\\slash",
        "tab\tnewline\n",
        "ü 你好 🌿",
        "%s %(x)s :name",
    ],
)
def test_an_identity_arrives_as_it_is_whatever_its_letters(api: Engine, tenant: Tenant, actor: str) -> None:
    assert identity(api, tenant, actor) == (str(tenant.id), actor)


def test_an_identity_is_gone_with_its_transaction(api: Engine, tenant: Tenant) -> None:
    identity(api, tenant, "somebody")
    with service_transaction(api) as session:
        assert session.scalar(text("select current_setting('app.tenant_id', true)")) in (None, "")
        assert session.scalar(text("select current_setting('app.actor', true)")) in (None, "")


def test_a_transaction_that_fails_is_rolled_back_and_the_next_one_begins_anew(api: Engine, tenant: Tenant) -> None:
    with pytest.raises(ZeroDivisionError), tenant_transaction(api, tenant.id) as session:
        session.execute(text("select 1"))
        raise ZeroDivisionError
    assert identity(api, tenant, "next") == (str(tenant.id), "next")


def test_a_connection_ended_while_it_rested_is_replaced_unseen(api: Engine, owner: Engine, tenant: Tenant) -> None:
    identity(api, tenant, "before")
    end_connections(owner)
    time.sleep(0.6)  # longer than a connection is trusted
    assert identity(api, tenant, "after") == (str(tenant.id), "after")


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
