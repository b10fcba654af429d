"""The management port of a process: /metrics for Prometheus, /livez and /readyz for orchestrators.

It asks for no key, so it listens on loopback by default, and tenants must not reach it. It has threads of its own, so
that a process whose work hangs still reports this.
"""

from __future__ import annotations

import socket
import socketserver
import sys
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, make_wsgi_app

from core.settings import TelemetrySettings
from core.telemetry.liveness import PROCESS, Liveness
from core.telemetry.readiness import Readiness

log = structlog.get_logger()
_REQUEST_SECONDS = 10.0
_RETRY_AFTER = "2"


class ManagementServer:
    """Serves the management port, if the settings name one, until it is closed. Port 0 is any free port.

    Raises OSError if the port is taken.
    """

    def __init__(
        self,
        settings: TelemetrySettings,
        *,
        readiness: Readiness,
        liveness: Liveness = PROCESS,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._liveness, self._readiness = liveness, readiness
        self._show_metrics = make_wsgi_app(registry)
        self._server: _Server | None = None
        if settings.management_port is not None:
            sound = Gauge(
                "espalier_sound", "Whether nothing that this process depends on is at fault.", registry=registry
            )
            sound.set_function(lambda: liveness.find_fault() is None)
            self._server = _Server((settings.management_host, settings.management_port), _QuietRequest)
            self._server.set_app(self._answer)
            self._thread = liveness.start_thread(self._server.serve_forever, name="management")
            log.info("management.started", port=self.port)

    @property
    def port(self) -> int | None:
        return self._server.server_address[1] if self._server is not None else None

    def close(self) -> None:
        if self._server is not None:
            self._liveness.release(self._thread)
            self._server.shutdown()
            self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return cast("Iterable[bytes]", self._show_metrics(environ, start_response))
        status, line = self._look(path)
        headers = [("content-type", "text/plain; charset=utf-8")]
        headers += [("retry-after", _RETRY_AFTER)] if status == HTTPStatus.SERVICE_UNAVAILABLE else []
        start_response(f"{status.value} {status.phrase}", headers)
        return [f"{line}\n".encode()]

    def _look(self, path: str) -> tuple[HTTPStatus, str]:
        match path:
            case "/livez":
                fault, sound = self._liveness.find_fault(), f"ok: {', '.join(self._liveness.names)}"
            case "/readyz":
                fault, sound = self._find_obstacle()
            case _:
                return HTTPStatus.NOT_FOUND, "no such page"
        return (HTTPStatus.OK, sound) if fault is None else (HTTPStatus.SERVICE_UNAVAILABLE, fault)

    def _find_obstacle(self) -> tuple[str | None, str]:
        """Return why the process is not ready, if it is not, and what else is missing, in one line each."""
        verdict = self._readiness.find_verdict()
        sound = "ok" if verdict.trouble is None else f"degraded: {verdict.trouble.message}"
        return (None if verdict.obstacle is None else verdict.obstacle.message), sound


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without a name server's answer for this host, which the library's own method asks for."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = socket.gethostname(), self.server_address[1]
        self.setup_environ()

    def handle_error(self, _request: Any, _client_address: Any) -> None:
        log.warning("management.request_failed", exc_info=sys.exc_info())


class _QuietRequest(WSGIRequestHandler):
    """Logs no line for a scrape, and closes a connection on which a client sends nothing."""

    timeout = _REQUEST_SECONDS

    def log_message(self, *_arguments: Any) -> None:
        pass
