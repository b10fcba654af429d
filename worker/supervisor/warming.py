"""Keeps a base loaded while there is no work, and looks again and again at bases that could not be used.

It has its own thread from the worker's start to its end. So a first job waits for no load, and a base that becomes
usable is used without an operator's action.
"""

from __future__ import annotations

import threading

import structlog

from core.db.session import DATABASE_ERRORS
from core.telemetry.liveness import PROCESS
from worker.supervisor.runner import Runner

log = structlog.get_logger()
_STOP_SECONDS = 5.0


class Warmer:
    """Looks at every interval, until it is closed. The runner's own stop ends a load that is under way.

    One look loads one base, or inspects each, in bounded time. A look that takes longer than `patience_seconds` hangs.
    """

    def __init__(self, runner: Runner, *, interval_seconds: float, patience_seconds: float) -> None:
        self._runner = runner
        self._life = PROCESS.add_duty("warming bases", patience_seconds=patience_seconds)
        self._interval_seconds = interval_seconds
        self._stop_requested = threading.Event()

    def start(self) -> None:
        self._thread = PROCESS.start_thread(self._run, name="warmer")

    def close(self) -> None:
        """Stop. The runner must have been asked to stop before."""
        PROCESS.release(self._thread)
        self._stop_requested.set()
        self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        while not self._stop_requested.is_set():
            self._life.beat()
            try:
                self._runner.warm()
            except DATABASE_ERRORS as error:
                log.warning("database.unavailable", error=type(error).__name__)
            self._stop_requested.wait(self._interval_seconds)
        self._life.rest()
