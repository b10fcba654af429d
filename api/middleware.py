"""What every request gets: a limit on its body. What every answer gets: an id, rate limit headers, security headers."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import NoReturn

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.admission import LONG_BODIES
from api.metrics import count_answer
from core.domain.errors import DomainError
from core.domain.ids import new_id

_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store", "x-frame-options": "DENY"}
# Clients send the body right after the header. One that needs longer takes a place.
_MOMENT_SECONDS = 0.2


class RequestIdMiddleware:
    """Gives each request an id, counts it and times it. It is plain ASGI, so bodies and streams pass untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, began_at = f"req_{new_id().hex}", time.monotonic()
        structlog.contextvars.bind_contextvars(request_id=request_id)  # in this request's own task

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in (_HEADERS | scope.get("state", {}).get("rate_limit", {})).items():
                    headers[name] = value
                seconds = time.monotonic() - began_at
                count_answer(scope["method"], _template_of(scope), message["status"], seconds=seconds)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _template_of(scope: Scope) -> str:
    """Return the route's path with its parameters unfilled. So a label has one value a route."""
    return getattr(scope.get("route"), "path_format", "unmatched")


class BodyCapMiddleware:
    """Refuses a body beyond a limit. A route that streams its body has a limit of its own: see `get_body`.

    A body is kept until it is whole. One that arrives in several pieces, or late, holds a place meanwhile. A small body
    arrives in one piece right after its header and needs none.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as places:
            if scope["type"] == "http":
                receive = _BoundedBody(scope, receive, places, max_bytes=self._max_bytes).receive
            await self._app(scope, receive, send)


class _BoundedBody:
    """One request's body on its way to the code that keeps it whole."""

    def __init__(self, scope: Scope, receive: Receive, places: ExitStack, *, max_bytes: int) -> None:
        self._scope, self._receive, self._places = scope, receive, places
        self._max_bytes = max_bytes
        headers = Headers(scope=scope)
        told = headers.get("content-length", "")
        self._num_told = int(told) if told.isdecimal() else 0
        self._num_received = 0
        self._is_first = (
            bool(self._num_told) or "transfer-encoding" in headers
        )  # the first piece of a body is still to come
        self._has_place = False

    async def receive(self) -> Message:
        if self._scope.get("state", {}).get("is_body_streamed"):
            return await self._receive()
        if self._num_told > self._max_bytes:
            self._refuse()
        message = await (self._receive_first() if self._is_first else self._receive())
        self._num_received += len(message.get("body", b""))
        if self._num_received > self._max_bytes:
            self._refuse()
        return message

    async def _receive_first(self) -> Message:
        """Return the first piece. If none comes for a moment, the request takes a place and waits."""
        self._is_first = False
        coming = asyncio.ensure_future(self._receive())
        try:
            come, _ = await asyncio.wait({coming}, timeout=_MOMENT_SECONDS)
            if not come:
                self._take_place()
            message = await coming
        finally:
            coming.cancel()
        if message.get("more_body"):
            self._take_place()
        else:
            self._places.close()
        return message

    def _take_place(self) -> None:
        """Raises HTTPException: FastAPI would report any other error as a body that cannot be read."""
        identity = self._scope.get("state", {}).get("identity")
        if identity is None or self._has_place:
            return
        try:
            self._places.enter_context(LONG_BODIES.admit(identity.tenant_id))
        except DomainError as error:
            raise HTTPException(503) from error  # `errors` answers with the cause and its status
        self._has_place = True

    def _refuse(self) -> NoReturn:
        raise HTTPException(413, f"The body is larger than {self._max_bytes} bytes")
