"""The application: routes, error objects, and the two things every request shares (database pool, object store)."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

from api.auth import Authenticator
from api.document import DescribedApp
from api.errors import install_error_handlers
from api.feeds import EventFeed
from api.middleware import BodyCapMiddleware, RequestIdMiddleware
from api.previews import Previewer
from api.rate_limits import RateLimiter
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
    metrics,
    models,
    oversight,
    previews,
    streams,
    uploads,
)
from api.row_checks import RowChecker
from core.db.clock import DatabaseClock
from core.db.session import connect
from core.services.readiness import find_readiness
from core.settings import ApiSettings
from core.storage import S3ObjectStore
from core.telemetry.liveness import PROCESS

_ROUTES = (
    files,
    uploads,
    previews,
    fine_tuning,
    streams,
    metrics,
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
        """Return Starlette's stack inside of ours: its outermost layer answers errors that nobody expects."""
        return RequestIdMiddleware(super().build_middleware_stack())


def create_app(settings: ApiSettings) -> FastAPI:
    app = _App(
        title="Espalier",
        version="0.1.0",
        description="OpenAI's fine-tuning API on your own GPUs.",
        lifespan=_live,
        root_path=settings.root_path,
    )
    app.state.settings = settings
    database_url = settings.database_url.get_secret_value()
    app.state.engine = connect(database_url, pool_size=20, lock_timeout_seconds=10)
    app.state.feed = EventFeed(app.state.engine, database_url)
    app.state.authenticator = Authenticator(app.state.engine)
    app.state.rate_limiter = RateLimiter(settings.redis_url.get_secret_value()) if settings.redis_url else None
    app.state.clock = DatabaseClock(app.state.engine)
    app.state.store = S3ObjectStore(settings.storage_config, now=app.state.clock.recall)
    app.state.readiness = find_readiness(app.state.engine, app.state.store, is_store_vital=False)
    app.state.previewer = Previewer(app.state.store)
    app.state.row_checker = RowChecker(app.state.previewer)
    for routes in _ROUTES:
        app.include_router(routes.router)
    app.add_middleware(BodyCapMiddleware, max_bytes=settings.max_body_bytes)
    install_error_handlers(app)
    return app


@asynccontextmanager
async def _live(app: FastAPI) -> AsyncIterator[None]:
    feed: EventFeed = app.state.feed
    with closing(app.state.previewer), _keeping(app.state.clock):
        async with feed.running():
            yield


@contextmanager
def _keeping(clock: DatabaseClock) -> Iterator[None]:
    """Know the database's time within the block: a request that asked for it would wait in a place that others need."""
    stop_requested = threading.Event()
    thread = PROCESS.start_thread(lambda: clock.keep(stop_requested), name="clock")
    yield
    PROCESS.release(thread)
    stop_requested.set()
    thread.join()
