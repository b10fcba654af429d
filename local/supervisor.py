"""Keeps child processes running: a dead one is started again, with a growing delay.

If the system refuses to start a process, this counts as another death. Only `stop` waits. The launcher's loop calls
`revive`, so it can react to a signal at any time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from local.processes import ChildProcess, ProcessSpec

_DELAYS_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_HEALTHY_SECONDS = 60.0  # after this long a restart has the shortest delay again


@dataclass
class _Charge:
    child: ChildProcess
    started_at: float
    num_deaths: int = 0
    due_at: float | None = None

    @property
    def delay_seconds(self) -> float:
        return _DELAYS_SECONDS[min(self.num_deaths, len(_DELAYS_SECONDS)) - 1]


class Supervisor:
    """The child processes of one launcher, in the order in which they were started."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._charges: dict[str, _Charge] = {}

    def start(self, spec: ProcessSpec) -> ChildProcess:
        child = ChildProcess(spec, self._log_dir)
        self._charges[spec.name] = _Charge(child, time.monotonic())
        return child

    def process(self, name: str) -> ChildProcess:
        return self._charges[name].child

    @property
    def pids(self) -> dict[str, int]:
        return {name: charge.child.pid for name, charge in self._charges.items()}

    def revive(self) -> tuple[str, ...]:
        """Restart every dead process whose delay has passed, and return their names."""
        return tuple(
            name for name, charge in self._charges.items() if not charge.child.is_alive and self._revive(charge)
        )

    def stop(self) -> None:
        """End all, the last started first, so that no server ends before the processes that use it."""
        for charge in reversed(self._charges.values()):
            charge.child.stop()
        self._charges.clear()

    def _revive(self, charge: _Charge) -> bool:
        now = time.monotonic()
        if charge.due_at is None:
            is_healthy = now - charge.started_at > _HEALTHY_SECONDS
            charge.num_deaths = 1 if is_healthy else charge.num_deaths + 1
            charge.due_at = now + charge.delay_seconds
        if now < charge.due_at:
            return False
        try:
            charge.child = ChildProcess(charge.child.spec, self._log_dir)
        except OSError:  # a full disk, or no memory for a process: the others must not end because of it
            charge.num_deaths += 1
            charge.due_at = now + charge.delay_seconds
            return False
        charge.started_at, charge.due_at = now, None
        return True
