"""The step under way: what its linears need, where it can be interrupted, and which slots leave during it.

On a slow device a step takes a minute and more, and an order to stop a job must not wait for its end. So linears and
head call `pause` before their products: between two calls there is at most one product of siblings, or one chunk of the
labels. No row of a bank moves during a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from worker.engine.runs import Run
from worker.engine.slots import Slot

# A step with other jobs in it may continue this long after one of its jobs was evicted.
PATIENCE_SECONDS = 2.0


class StepGivenUpError(Exception):
    """The step under way is no longer needed, or has held an evicted job for too long."""


class StepContext:
    """What the engine, its linears and its head share during a step. An engine has one."""

    def __init__(self, device: torch.device) -> None:
        # Autograd differentiates a function only if an input requires it. The first layer's rows do not, but this one
        # does.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.runs: tuple[Run, ...] = ()
        # The slots whose examples are on the device now.
        self.slots: tuple[Slot, ...] = ()
        # By a linear's name: the rows that were multiplied, and its outputs, until the linear is called.
        self.waiting: dict[str, tuple[Tensor, Tensor]] = {}
        # Whether the last step took less than half of PATIENCE_SECONDS.
        self.was_brisk = False
        self._look: Callable[[], None] | None = None
        self._leaving: list[Slot] = []

    @property
    def is_under_way(self) -> bool:
        return self._look is not None

    @contextmanager
    def under_way(self, look: Callable[[], None]) -> Iterator[None]:
        """Begin a step, whose pauses call `look`. The rows of jobs evicted during it are removed at its end."""
        self._look = look
        begun_at = time.monotonic()
        try:
            yield
        finally:
            self.was_brisk = time.monotonic() - begun_at < PATIENCE_SECONDS / 2
            self._look = None
            self._remove_rows()

    @contextmanager
    def running(self, runs: tuple[Run, ...]) -> Iterator[None]:
        """Put these runs on the device. Nothing of them remains, even if the step ends between two siblings."""
        self.runs = runs
        self.slots = tuple(part.slot for run in runs for part in run.parts)
        try:
            yield
        finally:
            self.runs, self.slots = (), ()
            self.waiting.clear()

    def leave(self, slot: Slot) -> None:
        """Remove an evicted slot's row, now or at the end of the step under way."""
        slot.evicted_at = time.monotonic()
        self._leaving.append(slot)
        if not self.is_under_way:
            self._remove_rows()

    def pause(self) -> None:
        """Call the step's `look`. Raises StepGivenUpError when the step under way must not continue."""
        if self._look is None:
            return
        self._look()
        if not self._leaving:
            return
        evicted_at = [slot.evicted_at for slot in self.slots if slot.evicted_at is not None]
        is_unwanted = len(evicted_at) == len(self.slots)
        if evicted_at and (is_unwanted or time.monotonic() - min(evicted_at) > PATIENCE_SECONDS):
            raise StepGivenUpError

    def _remove_rows(self) -> None:
        while self._leaving:
            self._leaving.pop().row.remove()
