"""The dependencies of a request take no thread: a tenant's share of threads is used from the endpoint on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from tests.routes import all_routes, verbs_of

ROUTES = [pytest.param(route, id=f"{'|'.join(verbs_of(route))} {route.path}") for route in all_routes()]


def calls_of(dependant: Dependant) -> Iterator[object]:
    for each in dependant.dependencies:
        yield each.call
        yield from calls_of(each)


def is_async(call: object) -> bool:
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return any(is_kind(each) for is_kind in kinds for each in (call, type(call).__call__))


@pytest.mark.parametrize("route", ROUTES)
def test_every_dependency_of_a_route_runs_where_the_request_is(route: APIRoute) -> None:
    assert [call for call in calls_of(route.dependant) if not is_async(call)] == []
