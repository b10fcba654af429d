"""The application's own routes, so that generated tests cannot forget one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from api.main import create_app
from core.settings import ApiSettings

# Nothing listens there; building the application asks nobody.
_SETTINGS: dict[str, Any] = {
    "database_url": "postgresql://nobody@127.0.0.1:9/none",
    "s3_endpoint": "127.0.0.1:9",
    "s3_access_key": "none",
    "s3_secret_key": "none",
}


def make_app() -> FastAPI:
    return create_app(ApiSettings(**_SETTINGS))


def all_routes() -> list[APIRoute]:
    """Return every route that the application answers, with its full path."""
    return list(_walk(make_app().routes))


def verbs_of(route: APIRoute) -> list[str]:
    """Return the methods that a route answers, which FastAPI may leave open and we never do."""
    assert route.methods is not None
    return sorted(route.methods)


def document() -> dict[str, Any]:
    """Return the application's OpenAPI document."""
    return make_app().openapi()


def _walk(routes: Any) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif (included := getattr(route, "original_router", None)) is not None:
            yield from _walk(included.routes)
