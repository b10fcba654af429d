"""Listens to a NOTIFY channel on a connection of its own, for as long as the process lives.

A notification makes things quicker and is never relied upon: what was notified while the connection was away is lost,
so `on_connect` tells the owner to look for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import psycopg
import structlog
from psycopg import sql

log = structlog.get_logger()
_RETRY_SECONDS = 0.5
_STOP_POLL_SECONDS = 1.0


class Listener:
    """A thread that calls `on_payload` with every payload of a channel, and `on_connect` after every (re)connection."""

    def __init__(
        self, database_url: str, channel: str, *, on_payload: Callable[[str], None], on_connect: Callable[[], None]
    ) -> None:
        self._database_url, self._channel = database_url, channel
        self._on_payload, self._on_connect = on_payload, on_connect
        self._stop_requested = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name=f"listen:{channel}")
        self.thread.start()

    def close(self) -> None:
        self._stop_requested.set()
        self.thread.join()

    def _run(self) -> None:
        while not self._stop_requested.is_set():
            try:
                self._listen()
            except psycopg.OperationalError as error:
                log.warning("database.unavailable", channel=self._channel, error=type(error).__name__)
                self._stop_requested.wait(_RETRY_SECONDS)

    def _listen(self) -> None:
        with psycopg.connect(self._database_url, autocommit=True, connect_timeout=5) as connection:
            connection.execute(sql.SQL("listen {}").format(sql.Identifier(self._channel)))
            self._on_connect()
            while not self._stop_requested.is_set():
                for notification in connection.notifies(timeout=_STOP_POLL_SECONDS, stop_after=100):
                    self._on_payload(notification.payload)
