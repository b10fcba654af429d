"""What routes ask for: who calls and what they may, a transaction of that tenant, the store, the settings, the body.

What waits for nobody is `async def`, so that it runs where the request is: FastAPI takes a thread for each `def`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, cast

import anyio.from_thread
import structlog
from fastapi import Depends, Request
from fastapi.params import Depends as Dependency
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from api.admission import DOWNLOADS
from api.auth import Authenticator, find_operator
from api.feeds import EventFeed
from api.previews import Previewer
from api.rate_limits import RateLimiter
from api.routing import Deferred, Door, share_of
from api.row_checks import RowChecker
from core.db.clock import DatabaseClock
from core.db.session import operator_transaction, tenant_transaction
from core.domain.api_keys import Identity, OperatorIdentity, Scope
from core.domain.errors import PermissionDeniedError, RateLimitedError
from core.settings import ApiSettings
from core.storage import ObjectStore

_READING_METHODS = ("GET", "HEAD")


async def get_engine(request: Request) -> Engine:
    return cast("Engine", request.app.state.engine)


async def get_store(request: Request) -> ObjectStore:
    return cast("ObjectStore", request.app.state.store)


async def get_feed(request: Request) -> EventFeed:
    return cast("EventFeed", request.app.state.feed)


async def get_previewer(request: Request) -> Previewer:
    return cast("Previewer", request.app.state.previewer)


async def get_row_checker(request: Request) -> RowChecker:
    return cast("RowChecker", request.app.state.row_checker)


async def get_settings(request: Request) -> ApiSettings:
    return cast("ApiSettings", request.app.state.settings)


async def get_identity(request: Request) -> Identity:
    """Return who calls. Asked several times a request, it looks and counts once."""
    identity: Identity | None = getattr(request.state, "identity", None)
    if identity is None:
        request.state.identity = identity = await _identify(request)
    return identity


async def _identify(request: Request) -> Identity:
    authenticator: Authenticator = request.app.state.authenticator
    authorization = request.headers.get("authorization")
    identity = await authenticator.find(authorization)
    structlog.contextvars.bind_contextvars(tenant_id=str(identity.tenant_id))
    await _count_request(request, identity)
    return identity


async def _count_request(request: Request, identity: Identity) -> None:
    limiter: RateLimiter | None = request.app.state.rate_limiter
    if limiter is None or limiter.is_resting:
        return
    limit = identity.requests_per_minute or request.app.state.settings.requests_per_minute
    standing = limiter.draw(identity.tenant_id, limit=limit)
    if standing is None:
        async with share_of(identity):
            standing = await run_in_threadpool(limiter.count, identity.tenant_id, limit=limit)
    if standing is None:
        return
    request.state.rate_limit = standing.headers  # the middleware puts them on whatever is answered
    if standing.is_exceeded:
        raise RateLimitedError(
            f"Your organization may send {limit} requests a minute. Try again in {standing.seconds_left} s.",
            code="rate_limit_exceeded",
        )


@dataclass(frozen=True)
class ScopeGate(Door):
    """Lets a request pass whose key has the scope. Every route of a tenant stands behind exactly one."""

    scope: Scope

    async def __call__(self, request: Request) -> None:
        identity = await get_identity(request)
        if self.scope not in identity.scopes:
            raise PermissionDeniedError(
                f"This API key lacks the scope {self.scope.value!r}; it has {', '.join(sorted(identity.scopes))}.",
                code="insufficient_scope",
            )


def needs(scope: Scope) -> Dependency:
    """Return what a route lists in `dependencies` to say which scope a key must have to use it."""
    return cast("Dependency", Depends(ScopeGate(scope)))


async def get_operator(request: Request) -> OperatorIdentity:
    """Return the calling operator. For everybody else there is nothing here: the answer is that of an unknown URL.

    Every route of /admin asks this, by its gate and by its transaction. So a read-only key's changes are refused here,
    where no route can forget it. Raises PermissionDeniedError.
    """
    operator: OperatorIdentity | None = getattr(request.state, "operator", None)
    if operator is None:
        authorization = request.headers.get("authorization")
        operator = await find_operator(request.app.state.engine, authorization)
    if operator is None:
        raise HTTPException(404)
    _refuse_changes_by_readers(operator, request.method)
    request.state.operator = operator
    return operator


def _refuse_changes_by_readers(operator: OperatorIdentity, method: str) -> None:
    if operator.is_read_only and method not in _READING_METHODS:
        raise PermissionDeniedError(
            f"This operator key may only read. For {method}, use a key that was made without --read-only.",
            code="read_only_key",
        )


class OperatorGate(Door):
    """Lets operators pass."""

    async def __call__(self, request: Request) -> None:
        await get_operator(request)


async def get_operator_session(
    request: Request, operator: Annotated[OperatorIdentity, Depends(get_operator)]
) -> Deferred:
    return Deferred(partial(operator_transaction, request.app.state.engine, actor=operator.actor))


async def get_session(request: Request, identity: Annotated[Identity, Depends(get_identity)]) -> Deferred:
    return Deferred(partial(tenant_transaction, request.app.state.engine, identity.tenant_id, actor=identity.actor))


async def hold_place_for_archive(request: Request) -> AsyncIterator[None]:
    """Hold a place among the downloads if the answer is an archive; one of presigned URLs waits for nobody."""
    if "archive" not in request.query_params:
        yield
        return
    with DOWNLOADS.admit((await get_identity(request)).tenant_id):
        yield


async def get_body(request: Request) -> Iterator[bytes]:
    """Return the body as it arrives, of any length: whoever reads it keeps to caps of its own."""
    request.state.is_body_streamed = True
    return _iterate_body(request)


def _iterate_body(request: Request) -> Iterator[bytes]:
    """Yield the body's chunks as they arrive, from a route's own thread: the body is never held whole."""
    chunks = request.stream()

    async def next_chunk() -> bytes | None:
        return await anext(chunks, None)

    while (chunk := anyio.from_thread.run(next_chunk)) is not None:
        if chunk:
            yield chunk


async def get_now(request: Request) -> dt.datetime:
    """Return the database's time. A thread of its own asks for it."""
    clock: DatabaseClock = request.app.state.clock
    return clock.recall()


Caller = Annotated[Identity, Depends(get_identity)]
# Committed before the answer starts: no client ever holds an id that was not committed. For routes only, see `routing`.
Transaction = Annotated[Session, Depends(get_session)]
Operator = Annotated[OperatorIdentity, Depends(get_operator)]
OperatorTransaction = Annotated[Session, Depends(get_operator_session)]
Store = Annotated[ObjectStore, Depends(get_store)]
Feed = Annotated[EventFeed, Depends(get_feed)]
Previews = Annotated[Previewer, Depends(get_previewer)]
RowChecks = Annotated[RowChecker, Depends(get_row_checker)]
Settings = Annotated[ApiSettings, Depends(get_settings)]
Database = Annotated[Engine, Depends(get_engine)]
Body = Annotated[Iterator[bytes], Depends(get_body)]
Now = Annotated[dt.datetime, Depends(get_now)]
