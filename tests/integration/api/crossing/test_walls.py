"""The two protections between tenants, removed one at a time.

Without the tenant filter in every statement, row-level security still hides everything. Without both, the same requests
do leak, so the tests can detect a leak.
"""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.routing import APIRoute
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from core.db.session import service_transaction, tenant_transaction
from tests.factories.tenants import Tenant
from tests.integration.api.crossing.routes import LISTS, PLACED, PLACES, name_of, options_of, path_of, places_of
from tests.integration.api.crossing.watching import TENANT_TABLES, Watched, snapshot
from tests.integration.api.planting import Planted
from tests.routes import verbs_of


@pytest.mark.parametrize("route", PLACED, ids=name_of)
def test_the_filter_alone_hides_another_tenants_thing_too(
    unwalled: Watched, planted: Planted, own: Planted, asker: Tenant, route: APIRoute
) -> None:
    for place in places_of(route):
        for verb in verbs_of(route):
            wire_id = planted.ids[PLACES[place]]
            answer = unwalled.ask(verb, path_of(route, own.ids, place, wire_id), asker, **options_of(verb, route, own))
            assert answer.status_code == 404, (verb, place, answer.text)


def test_with_both_halves_of_the_wall_down_the_same_requests_do_leak(
    unwalled: Watched, planted: Planted, own: Planted, asker: Tenant
) -> None:
    unwalled.is_stripping = True
    leaking = set()
    looking = [route for route in PLACED if route.methods == {"GET"} and not route.path.endswith("/stream")]
    for route in looking:
        place = places_of(route)[0]
        path = path_of(route, planted.ids, place, planted.ids[PLACES[place]])
        answer = unwalled.ask("GET", path, asker, **options_of("GET", route, own))
        leaking |= {route.path} if answer.status_code == 200 else set()
    lists = {route.path for route in LISTS if planted.job in unwalled.ask("GET", route.path, asker).text}
    unwalled.is_stripping = False
    assert leaking == {route.path for route in looking}
    assert lists >= {"/v1/fine_tuning/jobs"}


def num_touched(session: Session, statement: str, victim: Tenant) -> int:
    """Return how many of a tenant's rows a statement has changed or deleted."""
    done: Any = session.execute(text(statement), {"id": victim.id})
    return int(done.rowcount)


@pytest.mark.parametrize("table", TENANT_TABLES)
def test_the_database_alone_keeps_every_table_apart(
    owner: Engine, api: Engine, planted: Planted, own: Planted, victim: Tenant, asker: Tenant, table: str
) -> None:
    del planted, own
    before = snapshot(owner, victim)
    with service_transaction(owner) as session:
        may_look = session.scalars(text("select has_table_privilege('espalier_api', :t, 'SELECT')"), {"t": table}).one()
        columns = list(
            session.scalars(
                text(
                    "select column_name from information_schema.column_privileges where grantee = 'espalier_api' and privilege_type = 'UPDATE' and table_name = :t"
                ),
                {"t": table},
            )
        )
        may_delete = session.scalars(
            text("select has_table_privilege('espalier_api', :t, 'DELETE')"), {"t": table}
        ).one()
    with tenant_transaction(api, asker.id) as session:
        if may_look:
            assert set(session.scalars(text(f"select distinct tenant_id from {table}"))) == {asker.id}
        for column in columns:
            assert num_touched(session, f"update {table} set {column} = {column} where tenant_id = :id", victim) == 0
        if may_delete:
            assert num_touched(session, f"delete from {table} where tenant_id = :id", victim) == 0
        session.rollback()
    assert snapshot(owner, victim) == before
