"""What every request shares: a cap on its body; what every answer does: an id, the caller's standing, closed doors."""

from __future__ import annotations

import uuid
from contextlib import ExitStack

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.admission import LONG_BODIES
from core.domain.errors import RateLimitedError, UnavailableError
from core.domain.ids import new_id

_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store", "x-frame-options": "DENY"}


class RequestIdMiddleware:
    """Plain ASGI, so that bodies and streams pass untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = f"req_{new_id().hex}"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in (_HEADERS | scope.get("state", {}).get("rate_limit", {})).items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, send_with_headers)


class BodyCapMiddleware:
    """Refuses to read a body beyond a cap. A route that streams its body has caps of its own: see `get_body`.

    A body is kept until it is whole. Only those that come in one piece, as the small ones do, are kept without a place.
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
    """One request's body on its way to whoever keeps it whole."""

    def __init__(self, scope: Scope, receive: Receive, places: ExitStack, *, max_bytes: int) -> None:
        self._scope, self._receive, self._places = scope, receive, places
        self._max_bytes = max_bytes
        told = Headers(scope=scope).get("content-length", "")
        self._num_told = int(told) if told.isdecimal() else 0
        self._num_received = 0
        self._has_place = False

    async def receive(self) -> Message:
        state = self._scope.get("state", {})
        if state.get("is_body_streamed"):
            return await self._receive()
        message = await self._receive() if self._num_told <= self._max_bytes else None
        self._num_received += len(message.get("body", b"")) if message else 0
        if message is None or self._num_received > self._max_bytes:
            raise HTTPException(413, f"The body is larger than {self._max_bytes} bytes")
        if message.get("more_body") and not self._has_place and "identity" in state:
            self._take_place(state["identity"].tenant_id)
        return message

    def _take_place(self, tenant_id: uuid.UUID) -> None:
        """Raises HTTPException: an error of any other kind would be told as a body that cannot be read."""
        try:
            self._places.enter_context(LONG_BODIES.admit(tenant_id))
        except (RateLimitedError, UnavailableError) as error:
            status = 429 if isinstance(error, RateLimitedError) else 503
            raise HTTPException(status, error.message, headers={"retry-after": "2"}) from error
        self._has_place = True
