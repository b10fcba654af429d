"""Listens to a NOTIFY channel on its own connection for as long as the process lives, across all losses of connection.

Notifications only speed things up. Those sent while the connection was away are lost, so `on_connect` tells the owner
to query for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from core.db.connections import Subscription
from core.db.session import DATABASE_ERRORS

log = structlog.get_logger()
_RETRY_SECONDS = 0.5
_STOP_POLL_SECONDS = 1.0


class Listener:
    """Calls `on_payload` with every payload of a channel, and `on_connect` after every connect and reconnect.

    `run` needs a thread of its own.
    """

    def __init__(
        self, database_url: str, channel: str, *, on_payload: Callable[[str], None], on_connect: Callable[[], None]
    ) -> None:
        self._database_url, self._channel = database_url, channel
        self._on_payload, self._on_connect = on_payload, on_connect
        self._stop_requested = threading.Event()

    def request_stop(self) -> None:
        self._stop_requested.set()

    def run(self) -> None:
        """Listen until told to stop."""
        while not self._stop_requested.is_set():
            try:
                self._listen()
            except DATABASE_ERRORS as error:
                log.warning("database.unavailable", channel=self._channel, error=type(error).__name__)
                self._stop_requested.wait(_RETRY_SECONDS)

    def _listen(self) -> None:
        with Subscription(self._database_url, self._channel) as subscription:
            self._on_connect()
            while not self._stop_requested.is_set():
                for payload in subscription.receive(timeout_seconds=_STOP_POLL_SECONDS):
                    self._on_payload(payload)
