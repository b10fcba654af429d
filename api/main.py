"""The application: its routes, its middleware, its error objects, and the resources that its requests share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

from api.docs_page import add_docs_page
from api.document import TAGS, DescribedApp
from api.errors import install_error_handlers
from api.middleware import BodyCapMiddleware, RequestIdMiddleware
from api.resources import make_resources, resources_of
from api.routes import (
    adapters,
    admin,
    api_keys,
    checkpoints,
    explanations,
    files,
    fine_tuning,
    graders,
    health,
    logs,
    models,
    observations,
    oversight,
    previews,
    streams,
    uploads,
)
from core.settings import ApiSettings

_ROUTES = (
    files,
    uploads,
    previews,
    fine_tuning,
    streams,
    observations,
    logs,
    explanations,
    checkpoints,
    graders,
    models,
    adapters,
    api_keys,
    admin,
    oversight,
    health,
)


class _App(DescribedApp):
    def build_middleware_stack(self) -> ASGIApp:
        """Return Starlette's stack inside our own layer, so that its answers to unexpected errors have an id too."""
        return RequestIdMiddleware(super().build_middleware_stack())


def create_app(settings: ApiSettings) -> FastAPI:
    app = _App(
        title="Espalier",
        version="0.1.0",
        description="OpenAI's fine-tuning API on your own GPUs.",
        openapi_tags=TAGS,
        lifespan=_live,
        root_path=settings.root_path,
        docs_url=None,  # FastAPI's own pages load their scripts from another host
        redoc_url=None,
    )
    app.state.resources = make_resources(settings)
    for routes in _ROUTES:
        app.include_router(routes.router)
    add_docs_page(app)
    app.add_middleware(BodyCapMiddleware, max_bytes=settings.max_body_bytes)
    install_error_handlers(app)
    return app


@asynccontextmanager
async def _live(app: FastAPI) -> AsyncIterator[None]:
    async with resources_of(app).running():
        yield
