"""Several API processes on one port. They share its listening socket and stop together.

The parent serves only the management port, and it replaces a child that has died. If a child dies within its first
seconds, all processes end, and what supervises this program decides when to start it again. A child whose parent has
died ends at once, so that no process stays on the port.

Each child writes its metrics to files of its own, which the parent adds up, and notes when its event loop last turned.
The counts of a dead child stay. Its gauges of open things do not.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from api.server import make_config, serve
from core.db.clock import DatabaseClock
from core.db.session import connect
from core.sandbox import die_with_parent, hide_memory
from core.scratch import scratch_directory
from core.services.readiness import find_readiness
from core.settings import ApiSettings
from core.storage import S3ObjectStore
from core.telemetry.liveness import PROCESS
from core.telemetry.logs import configure_logs
from core.telemetry.management import ManagementServer
from core.telemetry.tracing import configure_tracing

log = structlog.get_logger()
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_YOUNG_SECONDS = 5.0
_LOOP_PATIENCE_SECONDS = 30.0
_START_PATIENCE_SECONDS = 120.0
_METRICS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # read where prometheus_client is imported: by each child, as it starts
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class _Child:
    """`turned_at` is when its event loop last turned, by the clock that all processes share; 0 before the start."""

    process: SpawnProcess
    started_at: float
    turned_at: Any

    def find_fault(self) -> str | None:
        has_turned = self.turned_at.value > 0
        patience_seconds = _LOOP_PATIENCE_SECONDS if has_turned else _START_PATIENCE_SECONDS
        silent_seconds = time.monotonic() - (self.turned_at.value if has_turned else self.started_at)
        if silent_seconds <= patience_seconds:
            return None
        return f"API process {self.process.pid} is overdue: no sign of life for {silent_seconds:.0f} s"


class ProcessGroup:
    """The API processes of one port."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._children: list[_Child] = []
        PROCESS.add_check("API processes", self._find_fault)

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, or until a child dies young. Return the exit status."""
        woken = _note_signals()
        self._listener = make_config(self._settings).bind_socket()
        with ExitStack() as exits:
            directory = str(exits.enter_context(scratch_directory("api", Path(tempfile.gettempdir()))))
            os.environ[_METRICS_DIRECTORY] = directory  # before the first child starts
            exits.callback(self._stop)
            self._children = [self._start() for _ in range(self._settings.api_processes)]
            exits.callback(_start_management(self._settings, self._make_registry(directory)).close)
            while not _STOP_SIGNALS.intersection(woken.recv(64)):
                if not self._replace_dead():
                    return 1
        return 0

    def _make_registry(self, directory: str) -> CollectorRegistry:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=directory)  # type: ignore[no-untyped-call]
        processes = Gauge("espalier_api_processes", "API processes that are alive.", registry=registry)
        processes.set_function(lambda: sum(child.process.is_alive() for child in self._children))
        return registry

    def _find_fault(self) -> str | None:
        return next((fault for child in self._children if (fault := child.find_fault()) is not None), None)

    def _start(self) -> _Child:
        turned_at = _SPAWN.Value("d", 0.0, lock=False)
        process = _SPAWN.Process(target=_serve_as_child, args=(self._listener, turned_at))
        process.start()
        return _Child(process, time.monotonic(), turned_at)

    def _replace_dead(self) -> bool:
        """Start a process for each that has died. Return False if one died young."""
        for place, child in enumerate(self._children):
            if child.process.is_alive():
                continue
            lived_seconds = time.monotonic() - child.started_at
            log.error("api_process.died", status=child.process.exitcode, lived_seconds=round(lived_seconds, 1))
            mark_process_dead(child.process.pid)  # type: ignore[no-untyped-call]
            if lived_seconds < _YOUNG_SECONDS:
                return False
            self._children[place] = self._start()
        return True

    def _stop(self) -> None:
        for child in self._children:
            child.process.terminate()
        for child in self._children:
            child.process.join()


def serve_alone(settings: ApiSettings) -> None:
    """Serve in this process, with the management port on a thread of its own, until SIGTERM or SIGINT."""
    configure_tracing("api", settings)
    loop = PROCESS.add_duty("the event loop", patience_seconds=_LOOP_PATIENCE_SECONDS)
    management = _start_management(settings)
    try:
        serve(settings, show_life=loop.beat)
    finally:
        management.close()


def _start_management(settings: ApiSettings, registry: CollectorRegistry = REGISTRY) -> ManagementServer:
    engine = connect(settings.database_url.get_secret_value(), pool_size=1)
    store = S3ObjectStore(settings.storage_config, now=DatabaseClock(engine).now)
    readiness = find_readiness(engine, store, is_store_vital=False)
    return ManagementServer(settings, readiness=readiness, registry=registry)


def _note_signals() -> socket.socket:
    """Return a socket that yields the number of each signal, whichever thread the system delivers it to."""
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.detach())
    for each in (signal.SIGCHLD, *_STOP_SIGNALS):
        signal.signal(each, lambda _number, _frame: None)
    return woken


def _serve_as_child(listener: socket.socket, turned_at: Any) -> None:
    die_with_parent()
    hide_memory()
    configure_logs("api")
    PROCESS.start_thread(_end_with_parent, name="end with parent")
    settings = ApiSettings()
    configure_tracing("api", settings)

    def show_life() -> None:
        if (fault := PROCESS.find_fault()) is None:
            turned_at.value = time.monotonic()
        else:
            log.error("api_process.unsound", fault=fault)

    serve(settings, listener, show_life=show_life)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
