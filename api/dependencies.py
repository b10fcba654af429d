"""What routes declare that they need: the caller and its rights, a transaction, the store, the settings, the body.

Every dependency is `async def` and runs on the event loop, because FastAPI takes a thread for each `def`.
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
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from api.admission import DOWNLOADS
from api.auth import find_operator
from api.feeds import EventFeed
from api.previews import Previewer
from api.resources import resources_of
from api.routing import Deferred, Door, share_of
from api.row_checks import RowChecker
from core.db.session import OperatorSession, TenantSession, operator_transaction, tenant_transaction
from core.domain.api_keys import Identity, OperatorIdentity, Scope
from core.domain.errors import PermissionDeniedError, RateLimitedError
from core.settings import ApiSettings
from core.storage import ObjectStore

_READING_METHODS = ("GET", "HEAD")


async def get_engine(request: Request) -> Engine:
    return resources_of(request).engine


async def get_store(request: Request) -> ObjectStore:
    return resources_of(request).store


async def get_feed(request: Request) -> EventFeed:
    return resources_of(request).feed


async def get_previewer(request: Request) -> Previewer:
    return resources_of(request).previewer


async def get_row_checker(request: Request) -> RowChecker:
    return resources_of(request).row_checker


async def get_settings(request: Request) -> ApiSettings:
    return resources_of(request).settings


async def get_identity(request: Request) -> Identity:
    """Return the caller, who is looked up once a request. Raises UnauthenticatedError."""
    identity: Identity | None = getattr(request.state, "identity", None)
    if identity is None:
        identity = await resources_of(request).authenticator.find(request.headers.get("authorization"))
        structlog.contextvars.bind_contextvars(tenant_id=str(identity.tenant_id))
        request.state.identity = identity
    return identity


class RateGate(Door):
    """Counts a tenant's request once, and passes it within the tenant's limit. Every route of a tenant has it."""

    async def __call__(self, request: Request) -> None:
        if not getattr(request.state, "is_counted", False):
            await _count_request(request, await get_identity(request))
            request.state.is_counted = True


async def _count_request(request: Request, identity: Identity) -> None:
    """Raises RateLimitedError. The middleware puts the tenant's standing on whatever is answered."""
    resources = resources_of(request)
    limiter = resources.rate_limiter
    if limiter is None or limiter.is_resting:
        return
    limit = identity.requests_per_minute or resources.settings.requests_per_minute
    standing = limiter.draw(identity.tenant_id, limit=limit)
    if standing is None:
        async with share_of(identity):
            standing = await run_in_threadpool(limiter.count, identity.tenant_id, limit=limit)
    if standing is None:
        return
    request.state.rate_limit = standing.headers
    if standing.is_exceeded:
        raise RateLimitedError(
            f"Your organization may send {limit} requests a minute. Try again in {standing.seconds_left} s.",
            code="rate_limit_exceeded",
        )


@dataclass(frozen=True)
class ScopeGate(Door):
    """Passes a request whose key has the scope. Every route of a tenant has exactly one."""

    scope: Scope

    async def __call__(self, request: Request) -> None:
        identity = await get_identity(request)
        if self.scope not in identity.scopes:
            raise PermissionDeniedError(
                f"This API key lacks the scope {self.scope.value!r}; it has {', '.join(sorted(identity.scopes))}.",
                code="insufficient_scope",
            )


def needs(scope: Scope) -> Dependency:
    """Return the dependency of a route that needs a key with this scope."""
    return cast("Dependency", Depends(ScopeGate(scope)))


async def get_operator(request: Request) -> OperatorIdentity:
    """Return the calling operator. Other callers get the answer of an unknown URL.

    Every route of /admin depends on this, so it also refuses the changes of a read-only key. Raises
    PermissionDeniedError.
    """
    operator: OperatorIdentity | None = getattr(request.state, "operator", None)
    if operator is None:
        authorization = request.headers.get("authorization")
        operator = await find_operator(resources_of(request).engine, authorization)
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
    """Passes a request of an operator."""

    async def __call__(self, request: Request) -> None:
        await get_operator(request)


async def get_operator_session(
    request: Request, operator: Annotated[OperatorIdentity, Depends(get_operator)]
) -> Deferred:
    return Deferred(partial(operator_transaction, resources_of(request).engine, actor=operator.actor))


async def get_session(request: Request, identity: Annotated[Identity, Depends(get_identity)]) -> Deferred:
    return Deferred(partial(tenant_transaction, resources_of(request).engine, identity.tenant_id, actor=identity.actor))


async def hold_place_for_archive(request: Request) -> AsyncIterator[None]:
    """Hold a place among the downloads if the answer is an archive. Presigned URLs need none."""
    if "archive" not in request.query_params:
        yield
        return
    with DOWNLOADS.admit((await get_identity(request)).tenant_id):
        yield


async def get_body(request: Request) -> Iterator[bytes]:
    """Return the body as it arrives, of any length. The route that reads it limits its size."""
    request.state.is_body_streamed = True
    return _iterate_body(request)


def _iterate_body(request: Request) -> Iterator[bytes]:
    """Yield the body's chunks as they arrive, in the route's own thread. The body is never held whole."""
    chunks = request.stream()

    async def next_chunk() -> bytes | None:
        return await anext(chunks, None)

    while (chunk := anyio.from_thread.run(next_chunk)) is not None:
        if chunk:
            yield chunk


async def get_now(request: Request) -> dt.datetime:
    """Return the database's time, which a thread beside the requests keeps."""
    return resources_of(request).clock.recall()


Caller = Annotated[Identity, Depends(get_identity)]
# Committed before the answer starts, so that no client holds an id that was not committed. Only routes can use it.
Transaction = Annotated[TenantSession, Depends(get_session)]
Operator = Annotated[OperatorIdentity, Depends(get_operator)]
OperatorTransaction = Annotated[OperatorSession, Depends(get_operator_session)]
Store = Annotated[ObjectStore, Depends(get_store)]
Feed = Annotated[EventFeed, Depends(get_feed)]
Previews = Annotated[Previewer, Depends(get_previewer)]
RowChecks = Annotated[RowChecker, Depends(get_row_checker)]
Settings = Annotated[ApiSettings, Depends(get_settings)]
Database = Annotated[Engine, Depends(get_engine)]
Body = Annotated[Iterator[bytes], Depends(get_body)]
Now = Annotated[dt.datetime, Depends(get_now)]
