"""What the requests of one process share: pools of connections, threads that run beside them, and the settings.

It is made once, before the first request, and is the only value on the application's state.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass

from fastapi import FastAPI, Request
from sqlalchemy import Engine

from api.auth import Authenticator
from api.feeds import EventFeed
from api.previews import Previewer
from api.rate_limits import RateLimiter
from api.row_checks import RowChecker
from core.db.clock import DatabaseClock
from core.db.session import connect
from core.services.readiness import find_readiness
from core.settings import ApiSettings
from core.storage import ObjectStore, S3ObjectStore
from core.telemetry.liveness import PROCESS
from core.telemetry.readiness import Readiness


@dataclass(frozen=True)
class Resources:
    """What requests share. Without a `rate_limiter` no request is counted."""

    settings: ApiSettings
    engine: Engine
    clock: DatabaseClock
    store: ObjectStore
    authenticator: Authenticator
    rate_limiter: RateLimiter | None
    feed: EventFeed
    previewer: Previewer
    row_checker: RowChecker
    readiness: Readiness

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the threads beside the requests, and end them."""
        with closing(self.previewer), _keeping(self.clock):
            async with self.feed.running():
                yield


def make_resources(settings: ApiSettings) -> Resources:
    """Return what the settings name. No server is asked yet."""
    database_url = settings.database_url.get_secret_value()
    engine = connect(database_url, pool_size=20, lock_timeout_seconds=10)
    clock = DatabaseClock(engine)
    store = S3ObjectStore(settings.storage_config, now=clock.recall)
    previewer = Previewer(store)
    redis_url = settings.redis_url.get_secret_value() if settings.redis_url else None
    return Resources(
        settings=settings,
        engine=engine,
        clock=clock,
        store=store,
        authenticator=Authenticator(engine),
        rate_limiter=RateLimiter(redis_url, now=clock.recall) if redis_url else None,
        feed=EventFeed(engine, database_url),
        previewer=previewer,
        row_checker=RowChecker(previewer),
        readiness=find_readiness(engine, store, is_store_vital=False),
    )


def resources_of(holder: FastAPI | Request) -> Resources:
    """Return the resources of an application, or of the one that a request is for."""
    app = holder.app if isinstance(holder, Request) else holder
    resources: Resources = app.state.resources
    return resources


@contextmanager
def _keeping(clock: DatabaseClock) -> Iterator[None]:
    """Keep the database's time in a thread, so that no request has to wait for it."""
    stop_requested = threading.Event()
    thread = PROCESS.start_thread(lambda: clock.keep(stop_requested), name="clock")
    yield
    PROCESS.release(thread)
    stop_requested.set()
    thread.join()
