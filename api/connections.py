"""What a connection may cost before its request reaches the application.

uvicorn limits neither the size of a header, nor the time that it takes, nor the number of idle connections. Here a
connection is always in one of three states, and each state has a limit:

    waiting     for a whole header, before the first request or between two: `header_seconds`
    receiving   a body: at least MIN_BODY_BYTES must arrive in every `body_seconds`, unless we do not read
    answering   the client must read: at least MIN_BODY_BYTES of the unsent bytes must go in every `body_seconds`

Between two steps of a request (header complete, bytes of the body, end of the body) a connection may send
MAX_HEADER_BYTES, be they header, chunk extension, trailer or empty lines. When all connections are in use, a new one
takes the place of the one that has waited longest. Those that never sent a whole header go first. A new connection is
refused only if every other one is at work. Addresses are not counted: behind a proxy all clients have the same one.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import sys
import termios
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from api.errors import error_body
from api.metrics import count_refusal

MAX_HEADER_BYTES = 64 * 2**10
MAX_URL_BYTES = 32 * 2**10
MAX_HEADERS = 100
MAX_PIPELINED = 8
MIN_BODY_BYTES = 16 * 2**10
# How long a refused client may take to read the answer, and one that was answered early to finish its body.
_LINGER_SECONDS = 1.0
_DISCARD_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    """The limits that an operator sets."""

    max_connections: int
    header_seconds: float
    body_seconds: float


@dataclass(frozen=True)
class Refusal:
    """An answer that the server gives without the application."""

    status: HTTPStatus
    code: str
    message: str

    def to_bytes(self) -> bytes:
        body = json.dumps(error_body(self.status, self.message, code=self.code)).encode()
        lines = [
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
            *([b"retry-after: 2"] if self.status == HTTPStatus.SERVICE_UNAVAILABLE else ()),
        ]
        return STATUS_LINE[self.status] + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


_TOO_LARGE = Refusal(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "header_too_large",
    f"A header has at most {MAX_HEADERS} fields and {MAX_HEADER_BYTES} bytes.",
)
_URL_TOO_LONG = Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "url_too_long", f"A URL has at most {MAX_URL_BYTES} bytes.")
_HEADER_LATE = Refusal(HTTPStatus.REQUEST_TIMEOUT, "header_stalled", "The header took too long.")
_BODY_LATE = Refusal(HTTPStatus.REQUEST_TIMEOUT, "body_stalled", "The body came too slowly.")
_PIPELINED = Refusal(HTTPStatus.TOO_MANY_REQUESTS, "too_many_pipelined", "Wait for answers before you ask on.")
_FULL = Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too_many_connections", "Every connection is in use; try again.")


class Connections:
    """The connections of one process. They are used on its event loop only."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: set[BoundedProtocol] = set()
        # Connections that wait, longest first: those that never sent a whole header, and those that were served before.
        self._strangers: dict[BoundedProtocol, None] = {}
        self._idle: dict[BoundedProtocol, None] = {}

    def make_protocol(self, **options: Any) -> BoundedProtocol:
        """Return the protocol of a new connection. The server calls this in place of the protocol's class."""
        return BoundedProtocol(self, **options)

    def admit(self, newcomer: BoundedProtocol) -> bool:
        """Accept a connection, in the place of another if need be. Return False if every connection is at work."""
        if len(self._open) >= self.limits.max_connections:
            longest = next(iter(self._strangers), None) or next(iter(self._idle), None)
            if longest is None:
                return False
            self.forget(longest)
            longest.transport.abort()
        self._open.add(newcomer)
        self._strangers[newcomer] = None
        return True

    def note_work(self, connection: BoundedProtocol) -> None:
        self._strangers.pop(connection, None)
        self._idle.pop(connection, None)

    def note_idle(self, connection: BoundedProtocol) -> None:
        if connection in self._open:
            self._idle[connection] = None

    def forget(self, connection: BoundedProtocol) -> None:
        self._open.discard(connection)
        self.note_work(connection)

    def sweep(self, now: float) -> None:
        """End the connections that have passed a limit. `now` is the time of the event loop."""
        for connection in tuple(self._open):
            connection.check(now)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._house = connections
        self._refusal: Refusal | None = None
        self._is_refused = False
        self._is_waiting = True
        self._is_receiving = False  # a header is complete, and its body is not
        self._has_begun = False  # a header has begun and is not complete
        self._has_asked = False  # at least once, so there is a cycle
        self._since = self.loop.time()
        self._num_body_bytes = 0  # since `_since`
        self._num_bytes = 0  # since the last step of a request
        self._has_stepped = False
        self._write_since: float | None = None  # set while the transport has too much to send
        self._num_unsent = 0  # at `_write_since`

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._house.admit(self):
            self._is_refused = True
            count_refusal(_FULL.code)
            transport.write(_FULL.to_bytes())
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._house.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and not self._is_refused:
            room = MAX_HEADER_BYTES - self._num_bytes
            piece, data = data[:room], data[room:]
            self._has_stepped = False
            super().data_received(piece)
            self._num_bytes = 0 if self._has_stepped else self._num_bytes + len(piece)
            if self._num_bytes >= MAX_HEADER_BYTES:
                self._refuse(_TOO_LARGE)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._begin_write_window(self.loop.time())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_since = None

    # What the parser calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = True
        if self._is_waiting:
            self._since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refuse_in_parser(_URL_TOO_LONG)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._refuse_in_parser(_TOO_LARGE)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse_in_parser(_PIPELINED)
        super().on_headers_complete()
        self._house.note_work(self)
        self._is_waiting = self._has_begun = False
        self._is_receiving = self._has_stepped = self._has_asked = True
        self._begin_window(self.loop.time())

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._has_stepped = True
        self._num_body_bytes += len(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._has_stepped = True
        self._is_receiving = False

    # What the request's own cycle calls

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # none is pipelined behind it
            self._is_waiting = True
            self._since = self.loop.time()
            self._house.note_idle(self)

    # Bounds

    def check(self, now: float) -> None:
        """End this connection if it has passed a limit."""
        limits = self._house.limits
        if self._write_since is not None and now - self._write_since > limits.body_seconds:
            if self._num_unsent - self._count_unsent() < MIN_BODY_BYTES:
                self.transport.abort()
                return
            self._begin_write_window(now)
        if self._is_waiting:
            patience = _DISCARD_SECONDS if self._is_receiving else limits.header_seconds
            if now - self._since <= patience:
                return
            if self._has_begun:
                self._refuse(_HEADER_LATE)
            else:
                self.transport.close()
        elif self._is_receiving and now - self._since > limits.body_seconds:
            if self._num_body_bytes < MIN_BODY_BYTES and not self.flow.read_paused:
                self._refuse(_BODY_LATE)
            self._begin_window(now)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that the parser has refused or could not parse."""
        self._refuse(self._refusal or Refusal(HTTPStatus.BAD_REQUEST, "malformed_request", msg))

    def _refuse_in_parser(self, refusal: Refusal) -> None:
        """Stop the parser, which then calls `send_400_response`."""
        self._refusal = refusal
        raise ValueError(refusal.code)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer once and close. If the client would take the answer for that of another request, only close.

        The client has a moment to read the answer: bytes that arrive at a closed socket would discard it. What the
        client sends meanwhile is not read, because that would cost as much as accepting it.
        """
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        count_refusal(refusal.code)
        if not self._can_answer:
            self.transport.close()
            return
        if self._has_asked:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.pause_reading()
        self.transport.write(refusal.to_bytes())
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    @property
    def _can_answer(self) -> bool:
        if self._is_receiving:
            return not (self.cycle.response_started or self.pipeline)
        return not self._has_asked or self.cycle.response_complete

    def _begin_window(self, now: float) -> None:
        self._since = now
        self._num_body_bytes = 0

    def _begin_write_window(self, now: float) -> None:
        self._write_since = now
        self._num_unsent = self._count_unsent()

    def _count_unsent(self) -> int:
        """Return how many bytes the client has not taken yet, those in the kernel's buffer included.

        The kernel takes more from the transport only when a third of its own buffer is empty, and that buffer can be
        megabytes large.
        """
        held = bytearray(4)
        with suppress(OSError, ValueError):  # its socket has been closed
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, held)
        return int(self.transport.get_write_buffer_size()) + int.from_bytes(held, sys.byteorder)
