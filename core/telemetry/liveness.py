"""Liveness: whether the threads of this process run, and whether their repeated work is done in time.

| what is seen | the process |
|---|---|
| a thread has failed | ends at once, with status 1 |
| a thread has ended without being released | is at fault |
| a duty was not done for longer than its patience | is at fault |
| a server is away | is alive: a restart would not bring the server back |

A process with a failed thread would look alive and do half of its work. So it ends, and the system that keeps processes
running starts it again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

log = structlog.get_logger()
_FAILED_STATUS = 1


class Duty:
    """Repeated work of a thread. It is overdue `patience_seconds` after its last beat, unless it rests."""

    def __init__(self, name: str, *, patience_seconds: float) -> None:
        self.name, self._patience_seconds = name, patience_seconds
        self._beat_at: float | None = time.monotonic()

    def beat(self) -> None:
        """Note that the work continues."""
        self._beat_at = time.monotonic()

    def rest(self) -> None:
        """Note that the thread waits for work, which may take for ever."""
        self._beat_at = None

    def find_fault(self) -> str | None:
        beat_at = self._beat_at
        if beat_at is None or (silent_seconds := time.monotonic() - beat_at) <= self._patience_seconds:
            return None
        return f"{self.name} is overdue: no sign of life for {silent_seconds:.0f} s"


def end_process(name: str, error: BaseException | None) -> None:
    """End this process at once with status 1, because a thread or task that it depends on has failed."""
    log.critical("thread.failed", thread=name, exc_info=error)
    os._exit(_FAILED_STATUS)


@contextmanager
def ending_process(name: str) -> Iterator[None]:
    """Run a block. Any failure in it ends this process at once."""
    is_done = False
    try:
        yield
        is_done = True
    finally:
        if not is_done:
            end_process(name, sys.exception())


class _VitalThread(threading.Thread):
    """A thread whose failure ends the process at once, whatever the other threads wait for."""

    def run(self) -> None:
        with ending_process(self.name):
            super().run()


class Liveness:
    """The threads, duties and checks of one process. A check returns None, or in one line what is wrong."""

    def __init__(self) -> None:
        self._checks: list[tuple[str, Callable[[], str | None]]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what is watched."""
        return tuple(name for name, _check in self._checks)

    def add_duty(self, name: str, *, patience_seconds: float) -> Duty:
        duty = Duty(name, patience_seconds=patience_seconds)
        self.add_check(name, duty.find_fault)
        return duty

    def start_thread(self, work: Callable[[], None], *, name: str) -> threading.Thread:
        """Start a thread that the process depends on until it is released. Its failure ends the process."""
        thread = _VitalThread(target=work, daemon=True, name=name)
        self._watch(thread)
        thread.start()
        return thread

    def _watch(self, thread: threading.Thread) -> None:

        def find_fault() -> str | None:
            has_died = thread.ident is not None and not thread.is_alive()
            return f"thread {thread.name!r} is dead" if has_died else None

        self.add_check(f"thread {thread.name!r}", find_fault)

    def release(self, thread: threading.Thread) -> None:
        """No longer depend on a thread, which is about to end as it should."""
        self._checks = [each for each in self._checks if each[0] != f"thread {thread.name!r}"]

    def add_check(self, name: str, check: Callable[[], str | None]) -> None:
        self._checks.append((name, check))

    def find_faults(self) -> tuple[str, ...]:
        """Return what is wrong, in one line each."""
        faults = (check() for _name, check in tuple(self._checks))
        return tuple(fault for fault in faults if fault is not None)

    def find_fault(self) -> str | None:
        """Return the first thing that is wrong, in one line."""
        return next(iter(self.find_faults()), None)


# One for each process, like the registry of its metrics.
PROCESS = Liveness()
