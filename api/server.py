"""One process that serves the API, on a port of its own or on a listening socket that several processes share."""

from __future__ import annotations

import asyncio
import gc
import math
import resource
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from api.connections import Connections, Limits
from api.main import create_app
from api.resources import resources_of
from core.settings import ApiSettings

# A request changes threads twice, and each time it may wait this long for a thread that computes. Python's default is
# 5 ms.
_SWITCH_SECONDS = 0.001
# Files that are open besides the clients' connections: to the database and the object store, pipes, listeners.
_OTHER_FILES = 200
_TICKS_A_SWEEP = 10  # a tick is a tenth of a second


class ApiServer(uvicorn.Server):
    """A server with limits on its connections. Its event loop calls `show_life` once a second.

    When it is asked to stop, it ends the open event streams: it would wait for them for ever.
    """

    def __init__(self, settings: ApiSettings, *, show_life: Callable[[], None]) -> None:
        app = create_app(settings)
        self._connections = Connections(_limits_of(settings))
        super().__init__(make_config(settings, app, protocol=self._connections.make_protocol))
        self._feed = resources_of(app).feed
        self._show_life = show_life

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._feed.close()

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_A_SWEEP == 0:
            self._connections.sweep(asyncio.get_running_loop().time())
            self._show_life()
        return await super().on_tick(counter)


def make_config(settings: ApiSettings, app: object = None, *, protocol: Any = "httptools") -> uvicorn.Config:
    """Return the server's configuration. There is no access log: a line would cost as much as a request's own work.

    No connection is checked once the server stops. What is still under way then is cut off after `body_seconds`.
    """
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,
        loop="uvloop",
        http=protocol,
        ws="none",  # nothing would limit its connections
        timeout_graceful_shutdown=math.ceil(settings.body_seconds),
    )


def serve(
    settings: ApiSettings, listener: socket.socket | None = None, *, show_life: Callable[[], None] = lambda: None
) -> None:
    """Serve until SIGTERM or SIGINT. A healthy event loop calls `show_life` once a second."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    for each in (signal.SIGTERM, signal.SIGINT):  # the server raises them again once it has stopped
        signal.signal(each, _end)
    server = ApiServer(settings, show_life=show_life)
    gc.freeze()  # loaded code lives as long as the process, so no collection needs to look at it
    server.run([listener] if listener else None)


def _end(_number: int, _frame: FrameType | None) -> None:
    """End with status 0: a stop is no failure, and exit handlers must run."""
    sys.exit(0)


def _limits_of(settings: ApiSettings) -> Limits:
    """Return the limits within the files that the process may open. Raise that number as far as the system allows."""
    num_files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + _OTHER_FILES
    if num_files < wanted and num_files != resource.RLIM_INFINITY:
        num_files = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, most))
        wanted = num_files
    return Limits(max(1, wanted - _OTHER_FILES), settings.header_seconds, settings.body_seconds)
