"""How connections to the database are made, and how a connection that only listens notices a dead server.

A server that vanishes without a word (a power cut, a failover, a cable) sends nothing that would end a connection. By
TCP's defaults a sender then waits for 15 minutes, and a reader for ever. So the kernel is told to give up after
seconds: a sender after `tcp_user_timeout` without an acknowledgement, a reader after unanswered keepalives. This is
long before a worker that hears nothing must stop its trainer (two thirds of a lease of 60 s).

Behind a proxy the kernel at the other end is the proxy's. It acknowledges even when the server behind it is gone. So a
connection that listens also asks for an answer when it has received nothing for a while.
"""

from __future__ import annotations

import select
import time
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import errors, sql
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn

from core.database_urls import DatabaseAddress, read_url

_CONNECT_SECONDS = 5
# Keepalives after 5 s of silence, three at 3 s: a reader gives up after 14 s, a sender after 12.
CONNECTION_ARGUMENTS: dict[str, Any] = {
    "connect_timeout": _CONNECT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 12_000,  # ms
}
_SILENCE_SECONDS = 10.0
_ANSWER_SECONDS = 10.0


def open_connection(database_url: str) -> psycopg.Connection:
    """Return a connection for single statements: each is a transaction of its own."""
    return _open(read_url(database_url))


def _open(address: DatabaseAddress) -> psycopg.Connection:
    return psycopg.connect(autocommit=True, **CONNECTION_ARGUMENTS | dict(address.parameters))


class SilentServerError(Exception):
    """The other end of a connection acknowledges what it receives, but does not answer."""


class Subscription:
    """A connection that listens to one NOTIFY channel, from `__enter__` to `__exit__`.

    All of its methods raise DATABASE_ERRORS, also when a standby refuses to listen. A pooler that gives each
    transaction another session makes listening impossible: behind one, this class never receives anything.
    """

    def __init__(self, database_url: str, channel: str) -> None:
        self._address, self._channel = read_url(database_url), channel

    def __enter__(self) -> Self:
        self._connection = _open(self._address)
        try:
            if not self._address.is_pooled:
                self._listen()
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()

    def receive(self, *, timeout_seconds: float) -> list[str]:
        """Return the payloads that have come, without waiting if there are some, or none after the timeout."""
        if self._address.is_pooled:
            time.sleep(timeout_seconds)
            return []
        if time.monotonic() - self._heard_at > _SILENCE_SECONDS:
            self._listen()
        payloads = self._take_payloads()
        if not payloads and self._is_readable(timeout_seconds):
            self._consume()
            payloads = self._take_payloads()
        return payloads

    @property
    def _pgconn(self) -> PGconn:
        return self._connection.pgconn

    def _listen(self) -> None:
        """Start to listen, or repeat the statement, which changes nothing. The wait for the answer is bounded."""
        self._pgconn.send_query(sql.SQL("listen {}").format(sql.Identifier(self._channel)).as_bytes(self._connection))
        give_up_at = time.monotonic() + _ANSWER_SECONDS
        while self._pgconn.flush() or self._pgconn.is_busy():
            if not self._is_readable(give_up_at - time.monotonic()):
                raise SilentServerError(f"The server has not answered for {_ANSWER_SECONDS:.0f} s.")
            self._consume()
        while result := self._pgconn.get_result():  # the answer is here, so this does not block
            if result.status == ExecStatus.FATAL_ERROR:
                raise errors.error_from_result(result)

    def _is_readable(self, seconds: float) -> bool:
        poll = select.poll()  # select() takes no descriptor above 1023, and an API has thousands
        poll.register(self._pgconn.socket, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def _consume(self) -> None:
        self._pgconn.consume_input()
        self._heard_at = time.monotonic()

    def _take_payloads(self) -> list[str]:
        found = []
        while notification := self._pgconn.notifies():
            found.append(notification.extra.decode())
        return found
