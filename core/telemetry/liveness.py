"""Whether everything that this process depends on still runs: its threads, and what they do again and again.

A thread that has died is at fault, and so is a duty that has not been done for longer than its patience. A server that
is away is nobody's fault here: whoever waits for one goes on showing life, because a restart would not bring it back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Duty:
    """What a thread does again and again. It is overdue `patience_seconds` after its last beat, unless it rests."""

    def __init__(self, name: str, *, patience_seconds: float) -> None:
        self.name, self._patience_seconds = name, patience_seconds
        self._beat_at: float | None = time.monotonic()

    def beat(self) -> None:
        """Say that it goes on."""
        self._beat_at = time.monotonic()

    def rest(self) -> None:
        """Say that it waits for work now, and may do so for ever."""
        self._beat_at = None

    def find_fault(self) -> str | None:
        beat_at = self._beat_at
        if beat_at is None or (silent_seconds := time.monotonic() - beat_at) <= self._patience_seconds:
            return None
        return f"{self.name} is overdue: no sign of life for {silent_seconds:.0f} s"


class Liveness:
    """The threads, duties and checks of one process. A check returns None, or in one line what is wrong."""

    def __init__(self) -> None:
        self._checks: list[tuple[str, Callable[[], str | None]]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """What is looked at."""
        return tuple(name for name, _check in self._checks)

    def add_duty(self, name: str, *, patience_seconds: float) -> Duty:
        duty = Duty(name, patience_seconds=patience_seconds)
        self.add_check(name, duty.find_fault)
        return duty

    def watch(self, thread: threading.Thread) -> None:
        """Depend on a thread that has been started, or is about to be."""

        def find_fault() -> str | None:
            has_died = thread.ident is not None and not thread.is_alive()
            return f"thread {thread.name!r} is dead" if has_died else None

        self.add_check(f"thread {thread.name!r}", find_fault)

    def release(self, thread: threading.Thread) -> None:
        """Depend on a thread no more, which is about to end as it should."""
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


# This process's own, as the registry of its figures is.
PROCESS = Liveness()
