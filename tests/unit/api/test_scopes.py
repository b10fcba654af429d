"""No route of a tenant is open to every key: each names exactly one scope. No route is forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from api.dependencies import RateGate, ScopeGate
from api.main import _ROUTES
from api.routing import OneThreadRoute
from core.domain.api_keys import Scope
from tests.routes import all_routes, verbs_of

ROUTES = Path(__file__).resolve().parents[3] / "api/routes"
TENANT_ROUTES = [
    pytest.param(route, id=f"{'|'.join(verbs_of(route))} {route.path}")
    for route in all_routes()
    if route.path.startswith("/v1/")
]


def gates_of(route: APIRoute) -> list[ScopeGate]:
    return [each.dependency for each in route.dependencies if isinstance(each.dependency, ScopeGate)]


def test_the_walk_finds_the_routes() -> None:
    assert len(TENANT_ROUTES) >= 20


def test_every_module_of_routes_is_a_part_of_the_application() -> None:
    written = {path.stem for path in ROUTES.glob("*.py")} - {"__init__"}
    assert {routes.__name__.rpartition(".")[2] for routes in _ROUTES} == written, "name it in _ROUTES of api/main.py"


@pytest.mark.parametrize("route", TENANT_ROUTES)
def test_a_route_declares_one_scope(route: APIRoute) -> None:
    assert len(gates_of(route)) == 1, "write dependencies=[needs(Scope....)] on the route"


@pytest.mark.parametrize("route", TENANT_ROUTES)
def test_reading_never_needs_more_than_a_key_for_reading_has(route: APIRoute) -> None:
    (scope,) = [gate.scope for gate in gates_of(route)] or pytest.fail("the route has no scope")
    assert scope != Scope.SUBMIT or route.methods != {"GET"}
    assert scope != Scope.READ or route.methods == {"GET"}


@pytest.mark.parametrize("route", TENANT_ROUTES)
def test_a_route_counts_a_request_before_it_looks_at_its_scope(route: APIRoute) -> None:
    doors: list[object] = [type(each.dependency) for each in route.dependencies]
    assert doors[:2] == [RateGate, ScopeGate], (
        "make the router a TenantRouter, and give the route its scope with needs(...)"
    )


@pytest.mark.parametrize("route", all_routes(), ids=lambda route: route.path)
def test_every_route_stays_in_one_thread(route: APIRoute) -> None:
    assert isinstance(route, OneThreadRoute)


def test_keys_are_for_administrators_only() -> None:
    of_keys = [route for route in all_routes() if route.path.startswith("/v1/api_keys")]
    assert of_keys
    assert {gate.scope for route in of_keys for gate in gates_of(route)} == {Scope.ADMIN}
