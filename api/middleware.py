"""A request id on every answer, headers that cost nothing and close doors, and a cap on bodies that are read whole."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.domain.ids import new_id

_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store", "x-frame-options": "DENY"}
MAX_BODY_BYTES = 2**20


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
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, send_with_headers)


class BodyLimitMiddleware:
    """Refuses a body beyond its cap as it comes. Files and parts of uploads are streamed and have their own caps."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"The body is larger than {MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, receive if _is_streamed(scope) else receive_limited, send)


def _is_streamed(scope: Scope) -> bool:
    path = str(scope.get("path", ""))
    return path == "/v1/files" or (path.startswith("/v1/uploads/") and path.endswith("/parts"))
