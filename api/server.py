"""One process that serves the API: on a port of its own, or on a listening socket that it shares with its like."""

from __future__ import annotations

import gc
import socket
import sys
from types import FrameType

import uvicorn

from api.main import create_app
from core.settings import ApiSettings

# A request changes threads twice, and each time may wait this long for a thread that computes. Python's own is 5 ms.
_SWITCH_SECONDS = 0.001


class ApiServer(uvicorn.Server):
    """A server that ends the open event streams when it is asked to stop: it would wait for them for ever."""

    def __init__(self, settings: ApiSettings) -> None:
        app = create_app(settings)
        super().__init__(make_config(settings, app))
        self._feed = app.state.feed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._feed.close()


def make_config(settings: ApiSettings, app: object = None) -> uvicorn.Config:
    """Return the server's configuration. A line a request would cost as much as the request's own work."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,
        loop="uvloop",
        http="httptools",
    )


def serve(settings: ApiSettings, listener: socket.socket | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    server = ApiServer(settings)
    gc.freeze()  # what was loaded lives as long as the process: no collection looks at it again while a request waits
    server.run([listener] if listener else None)
