"""Readiness: whether a process can work. Each need is checked when a probe asks, but at most once a second.

| a need | answers | stopped answering | has never answered |
|---|---|---|---|
| vital | ready | not ready | not ready |
| not vital | ready | ready, and reported as a trouble | not ready |

A process can do part of its work without a need that is not vital. If it has never reached such a need, it is probably
configured wrongly, and must not replace a process that works. If the need stops answering later, all processes share
the trouble. To take them all out of service would also end the work that does not need it.

One thread checks each need, so a server that hangs holds only that thread. A probe gets its answer after at most
`PATIENCE_SECONDS`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from core.domain.errors import UnavailableError

PATIENCE_SECONDS = 4.0  # the probes of orchestrators wait for 5 s
_TTL_SECONDS = 1.0


@dataclass(frozen=True)
class Need:
    """A server that `check` asks. `check` raises UnavailableError; `code` is the error's while no answer has come."""

    name: str
    code: str
    check: Callable[[], None]
    is_vital: bool = True


@dataclass(frozen=True)
class Verdict:
    """What keeps a process from being ready, or what it works without, in one line each."""

    obstacle: UnavailableError | None = None
    trouble: UnavailableError | None = None


class Readiness:
    """The needs of a process, the most important first. Shared by the threads of a process."""

    def __init__(self, *needs: Need) -> None:
        self._probes = tuple(_Probe(need) for need in needs)

    def ask(self) -> Sequence[Future[None]]:
        """Start the checks that are due. Return what to wait for before `judge`, for `PATIENCE_SECONDS` at most."""
        asked = [(probe, probe.ask()) for probe in self._probes]
        return [ended for probe, ended in asked if probe.is_needed]

    def judge(self) -> Verdict:
        """Return the verdict from what is known now."""
        missing = [(probe, fault) for probe in self._probes if (fault := probe.find_fault()) is not None]
        obstacle = next((fault for probe, fault in missing if probe.is_needed), None)
        return Verdict(obstacle, trouble=next((fault for _probe, fault in missing), None))

    def find_verdict(self) -> Verdict:
        """Ask, wait and judge, for callers that may block."""
        wait(self.ask(), PATIENCE_SECONDS)
        return self.judge()


class _Probe:
    """One need, and the result of its last check."""

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
        """Start a check in a thread, unless one runs or has just ended. Return a future of the answer."""
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
