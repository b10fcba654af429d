"""Whether a process can work: what it needs is asked, once a second at most, when somebody wants to know.

Each need is asked by one thread at a time. A server that hangs holds that thread and nobody else: whoever wants to know
is told after `PATIENCE_SECONDS` that it has not answered.

What a process can do part of its work without keeps it from being ready only until it has answered once. A process that
was never able to reach it is set up wrongly, and must not take the place of one that works. Later its absence is a
trouble: all processes share it, and to take them all away would end what needs it not, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from core.domain.errors import UnavailableError

PATIENCE_SECONDS = 4.0  # whoever probes waits for 5 s
_TTL_SECONDS = 1.0


@dataclass(frozen=True)
class Need:
    """Something that is asked by `check`, which raises UnavailableError. It has `code` while it does not answer."""

    name: str
    code: str
    check: Callable[[], None]
    is_vital: bool = True


@dataclass(frozen=True)
class Verdict:
    """What keeps a process from being ready, or else what it works without. Each is told in one line."""

    obstacle: UnavailableError | None = None
    trouble: UnavailableError | None = None


class Readiness:
    """What a process needs, the most important first. Shared by the threads of a process."""

    def __init__(self, *needs: Need) -> None:
        self._probes = tuple(_Probe(need) for need in needs)

    def ask(self) -> Sequence[Future[None]]:
        """Ask what is to be asked, and return what to wait for before the verdict: for `PATIENCE_SECONDS` at most."""
        asked = [(probe, probe.ask()) for probe in self._probes]
        return [ended for probe, ended in asked if probe.is_needed]

    def judge(self) -> Verdict:
        """Return what is known."""
        missing = [(probe, fault) for probe in self._probes if (fault := probe.find_fault()) is not None]
        obstacle = next((fault for probe, fault in missing if probe.is_needed), None)
        return Verdict(obstacle, trouble=next((fault for _probe, fault in missing), None))

    def find_verdict(self) -> Verdict:
        """Ask, wait and judge, for callers that may block."""
        wait(self.ask(), PATIENCE_SECONDS)
        return self.judge()


class _Probe:
    """One need, and what was last found of it."""

    def __init__(self, need: Need) -> None:
        self._need = need
        self._lock = threading.Lock()
        self._ended: Future[None] | None = None
        self._asked_at = self._ended_at = 0.0
        self._fault: UnavailableError | None = self._say("has not answered yet")
        self._has_answered = False

    @property
    def is_needed(self) -> bool:
        return self._need.is_vital or not self._has_answered

    def ask(self) -> Future[None]:
        """Ask in a thread, unless that was done a moment ago or goes on. What is returned is done with the answer."""
        with self._lock:
            if self._ended is None or (self._ended.done() and time.monotonic() - self._ended_at >= _TTL_SECONDS):
                self._ended, self._asked_at = Future(), time.monotonic()
                threading.Thread(target=self._look, args=(self._ended,), daemon=True, name=self._need.name).start()
            return self._ended

    def find_fault(self) -> UnavailableError | None:
        with self._lock:
            is_open = self._ended is not None and not self._ended.done()
            if is_open and time.monotonic() - self._asked_at >= PATIENCE_SECONDS:
                return self._say(f"has not answered for {time.monotonic() - self._asked_at:.0f} s")
            return self._fault

    def _look(self, ended: Future[None]) -> None:
        fault: UnavailableError | None = self._say("could not be asked")
        try:
            self._need.check()
            fault, self._has_answered = None, True
        except UnavailableError as error:
            fault = error
        finally:
            self._fault, self._ended_at = fault, time.monotonic()
            ended.set_result(None)

    def _say(self, what: str) -> UnavailableError:
        return UnavailableError(f"The {self._need.name} {what}.", code=self._need.code)
