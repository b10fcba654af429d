"""Tenants cannot reach each other: every route, verb and kind of id is crossed, as the application's routes give them.

The answer about another tenant's thing equals the answer about a thing that does not exist: the same status, words,
headers and queries.
"""

from __future__ import annotations

import re

import pytest
from fastapi.routing import APIRoute
from sqlalchemy import Engine

from tests.factories.tenants import Tenant
from tests.integration.api.crossing.routes import (
    BODIES,
    CURSORS,
    FORMS,
    LISTS,
    PLACED,
    PLACES,
    REFUSING,
    ROUTES,
    VERBS,
    fill,
    filled_path,
    name_of,
    never_was,
    options_of,
    path_of,
    places_of,
)
from tests.integration.api.crossing.watching import Watched, seen, snapshot
from tests.integration.api.planting import Planted
from tests.routes import verbs_of


def test_no_route_is_uncovered() -> None:
    assert len(PLACED) >= 10
    unknown = {place for route in PLACED for place in places_of(route)} - set(PLACES)
    assert not unknown, f"say in PLACES what stands there, and plant one: {unknown}"
    asking = {f"{verb} {route.path}": route for route in ROUTES for verb in verbs_of(route)}
    with_body = {name for name, route in asking.items() if route.body_field}
    assert with_body <= set(BODIES), "say in BODIES what a good body is, with the ids that it may name"
    forms = {name for name in asking if name.startswith("POST") and "{" not in name} - with_body
    assert forms == FORMS | REFUSING, "say in FORMS that it reads its body itself"
    cursors = {route.path for route in ROUTES if any(each.name == "after" for each in route.dependant.query_params)}
    assert cursors == set(CURSORS), "say in CURSORS which kind of id continues the list"


def test_every_table_with_a_tenant_is_planted(owner: Engine, planted: Planted, victim: Tenant) -> None:
    del planted
    empty = {name for name, rows in snapshot(owner, victim).items() if not rows}
    assert not empty, f"plant a row in tests/integration/api/planting.py: {empty}"


@pytest.mark.fault(46)
@pytest.mark.parametrize("route", PLACED, ids=name_of)
@pytest.mark.parametrize("is_stripping", [False, True], ids=["as-it-is", "filter-stripped"])
def test_another_tenants_thing_is_a_thing_that_never_was(
    walled: Watched,
    owner: Engine,
    planted: Planted,
    own: Planted,
    victim: Tenant,
    asker: Tenant,
    route: APIRoute,
    is_stripping: bool,
) -> None:
    walled.is_stripping, walled.num_stripped = is_stripping, 0
    before = snapshot(owner, victim)
    for place in places_of(route):
        for kind, wire_id in planted.ids.items():
            for verb in VERBS if kind == PLACES[place] else verbs_of(route):
                told = []
                for each in (wire_id, never_was(wire_id)):
                    path = path_of(route, own.ids, place, each)
                    answer = walled.ask(verb, path, asker, **options_of(verb, route, own))
                    told.append((seen(answer, each), list(walled.statements)))
                assert told[0] == told[1], (verb, place, kind)
                # An id with slashes in a place that takes none is another path, and says so by itself.
                fits = "/" not in wire_id or f"{{{place}:path}}" in route.path
                if verb in verbs_of(route) and fits:
                    assert answer.status_code == 404, (verb, place, kind, answer.text)
                assert answer.status_code in {400, 404, 405}
    walled.is_stripping = False
    assert snapshot(owner, victim) == before
    assert walled.num_stripped > 0 or not is_stripping


@pytest.mark.parametrize("route", LISTS, ids=name_of)
@pytest.mark.parametrize("is_stripping", [False, True], ids=["as-it-is", "filter-stripped"])
def test_a_list_shows_nothing_of_another_tenants(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, route: APIRoute, is_stripping: bool
) -> None:
    del own
    walled.is_stripping = is_stripping
    answer = walled.ask("GET", route.path, asker)
    walled.is_stripping = False
    assert answer.status_code == 200
    assert not [name for name, value in planted.ids.items() if value in answer.text]


@pytest.mark.parametrize("route", CURSORS)
def test_a_cursor_of_another_tenants_is_one_that_never_was(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, route: str
) -> None:
    kind, told = CURSORS[route], []
    _, path = filled_path(f"GET {route}", own)
    for each in (planted.ids[kind], never_was(planted.ids[kind])):
        answer = walled.ask("GET", path, asker, params={"after": each})
        told.append((seen(answer, each), list(walled.statements)))
    assert told[0] == told[1]


@pytest.mark.parametrize("route", sorted(BODIES))
@pytest.mark.parametrize("is_stripping", [False, True], ids=["as-it-is", "filter-stripped"])
def test_a_body_that_names_another_tenants_thing_is_refused_like_one_that_names_nothing(
    walled: Watched,
    owner: Engine,
    planted: Planted,
    own: Planted,
    victim: Tenant,
    asker: Tenant,
    route: str,
    is_stripping: bool,
) -> None:
    verb, path = filled_path(route, own)
    walled.is_stripping = is_stripping
    before = snapshot(owner, victim), snapshot(owner, asker)
    for body in BODIES[route]:
        for kind in re.findall(r"'{(?!own_)(\w+)}'", str(body)):
            told = []
            for each in (planted.ids[kind], never_was(planted.ids[kind])):
                answer = walled.ask(verb, path, asker, json=fill(body, own, kind, each))
                told.append((seen(answer, each), list(walled.statements)))
            assert told[0] == told[1], (body, kind)
            assert answer.status_code in (400, 404), answer.text
    walled.is_stripping = False
    assert (snapshot(owner, victim), snapshot(owner, asker)) == before


@pytest.mark.parametrize("route", sorted(BODIES))
def test_nobody_chooses_an_id_or_a_tenant(
    walled: Watched, own: Planted, planted: Planted, asker: Tenant, route: str
) -> None:
    verb, path = filled_path(route, own)
    good = fill(BODIES[route][0], own, "file", own.file)
    for name, value in (("id", planted.job), ("tenant_id", planted.tenant), ("organization_id", planted.tenant)):
        answer = walled.ask(verb, path, asker, json=good | {name: value})
        assert answer.status_code == 400, (name, answer.text)
