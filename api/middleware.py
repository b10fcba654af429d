"""What every request shares: a cap on its body; what every answer does: an id, the caller's standing, closed doors."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    """Refuses to read a body beyond a cap. A route that streams its body has caps of its own: see `get_body`."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        told = Headers(scope=scope).get("content-length", "")
        num_bytes = int(told) if told.isdecimal() else 0
        num_received = 0

        async def receive_within_cap() -> Message:
            nonlocal num_received
            if scope.get("state", {}).get("is_body_streamed"):
                return await receive()
            message = await receive() if num_bytes <= self._max_bytes else None
            num_received += len(message.get("body", b"")) if message else 0
            if message is None or num_received > self._max_bytes:
                raise HTTPException(413, f"The body is larger than {self._max_bytes} bytes")
            return message

        return await self._app(scope, receive_within_cap, send)
