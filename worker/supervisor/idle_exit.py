"""Ends a worker that has held no job for long, so that its GPU can be given back.

The runner decides, under the lock that it holds while it serves. So a worker leaves before a claim or after the end of
its last job, never in between. A wake-up that arrives after the decision is lost. Its job stays queued, and the
schedule wakes another worker for it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import structlog

from core.db.session import DATABASE_ERRORS
from core.telemetry.liveness import PROCESS, Liveness
from worker.supervisor.runner import Runner

log = structlog.get_logger()
_LOOKS_PER_IDLE_TIME = 10
_MAX_LOOK_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0  # longer than the longest wait for the database


def ask_own_process_to_stop() -> None:
    """Stop as on a signal: Celery's warm shutdown, exit status 0. Celery's handler must be installed already."""
    os.kill(os.getpid(), signal.SIGTERM)


class IdleExit:
    """Looks several times within `idle_seconds`; `end_process` is called once, when the runner has stopped serving."""

    def __init__(
        self,
        runner: Runner,
        *,
        idle_seconds: float,
        end_process: Callable[[], None] = ask_own_process_to_stop,
        liveness: Liveness = PROCESS,
    ) -> None:
        self._runner = runner
        self._liveness = liveness
        self._idle_seconds = idle_seconds
        self._end_process = end_process

    def start(self) -> None:
        self._life = self._liveness.add_duty("looking whether to leave", patience_seconds=_PATIENCE_SECONDS)
        self._liveness.start_thread(self._watch, name="idle-exit")

    def _watch(self) -> None:
        while not self._has_left():
            self._life.beat()
            time.sleep(min(self._idle_seconds / _LOOKS_PER_IDLE_TIME, _MAX_LOOK_SECONDS))
        self._life.rest()
        self._liveness.release(threading.current_thread())
        log.info("worker.idled_out", idle_seconds=self._idle_seconds)
        self._end_process()

    def _has_left(self) -> bool:
        try:
            return self._runner.leave_if_idle(self._idle_seconds)
        except DATABASE_ERRORS:  # it is unknown whether there is work, so the base stays loaded
            return False
