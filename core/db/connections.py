"""How every connection to the database is made, and how one that only listens finds out that nobody is there.

A server that vanishes without a word (a power cut, a failover, a cable) sends nothing that would end a connection, and
by TCP's defaults a sender waits for 15 minutes and a reader for ever. So the kernel is told to give up after seconds:
what is sent and not acknowledged after `tcp_user_timeout`, a connection on which one only waits after unanswered
keepalives. That is long before a worker that hears nothing must stop its trainer (two thirds of a lease of 60 s).

Behind a proxy the kernel at the other end is the proxy's, which acknowledges for a server that is gone. Therefore a
connection that listens also asks for an answer when it has heard nothing for a while.
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
    """The other end of a connection acknowledges what is sent, and answers nothing."""


class Subscription:
    """A connection that listens to one NOTIFY channel, from `__enter__` to `__exit__`.

    All of it raises DATABASE_ERRORS: a standby's refusal, too, which has no channels. Behind a pooler that gives each
    transaction another session nobody can listen: there it hears nothing, ever.
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
        """Return the payloads that have come, at once where there are some, or none after the timeout."""
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
        """Begin to listen, or say so again, which changes nothing. The answer is waited for within bounds."""
        self._pgconn.send_query(sql.SQL("listen {}").format(sql.Identifier(self._channel)).as_bytes(self._connection))
        give_up_at = time.monotonic() + _ANSWER_SECONDS
        while self._pgconn.flush() or self._pgconn.is_busy():
            if not self._is_readable(give_up_at - time.monotonic()):
                raise SilentServerError(f"The server has not answered for {_ANSWER_SECONDS:.0f} s.")
            self._consume()
        while result := self._pgconn.get_result():  # of an answer that is here
            if result.status == ExecStatus.FATAL_ERROR:
                raise errors.error_from_result(result)

    def _is_readable(self, seconds: float) -> bool:
        poll = select.poll()  # select takes no descriptor over 1023, and an API has thousands
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
