"""Several API processes on one port: they share its listening socket, and stop together.

The parent serves nothing; it replaces a child that has died. One that dies young is no accident: then all end, and
whoever keeps this program running decides when it is tried again. A child whose parent is gone ends at once, so that
nobody is left on the port.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess

import structlog

from api.server import make_config, serve
from core.sandbox import die_with_parent, hide_memory
from core.settings import ApiSettings
from core.telemetry import configure_logs

log = structlog.get_logger()
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_YOUNG_SECONDS = 5.0


@dataclass(frozen=True)
class _Child:
    process: SpawnProcess
    started_at: float


class ProcessGroup:
    """The API processes of one port."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._children: list[_Child] = []

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, or until a child dies young; return the exit status."""
        woken = _note_signals()
        self._listener = make_config(self._settings).bind_socket()
        self._children = [self._start() for _ in range(self._settings.api_processes)]
        try:
            while not _STOP_SIGNALS.intersection(woken.recv(64)):
                if not self._replace_dead():
                    return 1
        finally:
            self._stop()
        return 0

    def _start(self) -> _Child:
        process = multiprocessing.get_context("spawn").Process(target=_serve_as_child, args=(self._listener,))
        process.start()
        return _Child(process, time.monotonic())

    def _replace_dead(self) -> bool:
        """Start a process for each that has died; False where one died young."""
        for place, child in enumerate(self._children):
            if child.process.is_alive():
                continue
            lived_seconds = time.monotonic() - child.started_at
            log.error("api_process.died", status=child.process.exitcode, lived_seconds=round(lived_seconds, 1))
            if lived_seconds < _YOUNG_SECONDS:
                return False
            self._children[place] = self._start()
        return True

    def _stop(self) -> None:
        for child in self._children:
            child.process.terminate()
        for child in self._children:
            child.process.join()


def _note_signals() -> socket.socket:
    """Return a socket that yields the number of each signal that comes, whichever thread the system gives it to."""
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.detach())
    for each in (signal.SIGCHLD, *_STOP_SIGNALS):
        signal.signal(each, lambda _number, _frame: None)
    return woken


def _serve_as_child(listener: socket.socket) -> None:
    die_with_parent()
    hide_memory()
    threading.Thread(target=_end_with_parent, daemon=True, name="end with parent").start()
    configure_logs("api")
    serve(ApiSettings(), listener)  # read from the environment, as the parent's were


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
