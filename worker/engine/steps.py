"""The step under way: what its linears need to know of it, where it can be left, and which slots leave during it.

On a slow device a step takes a minute and more, and an order to stop a job does not wait for the step's end. So linears
and head call `pause` before their products: between two calls lies at most what siblings multiply, or one chunk of the
labels. No row of a bank moves while a step is under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from worker.engine.runs import Run
from worker.engine.slots import Slot

# For so long may a step go on after a job was evicted from it, when other jobs are in it as well.
PATIENCE_SECONDS = 2.0


class StepGivenUpError(Exception):
    """The step under way serves nobody any more, or has kept a job that was evicted for too long."""


class StepContext:
    """What the engine, its linears and its head share of the step under way. An engine has one."""

    def __init__(self, device: torch.device) -> None:
        # Autograd differentiates a function only when an input requires it. The first layer's rows do not; this does.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.runs: tuple[Run, ...] = ()
        # Whose examples are on the device now.
        self.slots: tuple[Slot, ...] = ()
        # By the name of a linear: the rows that were multiplied, and its outputs, which wait for the linear's call.
        self.waiting: dict[str, tuple[Tensor, Tensor]] = {}
        # Whether the last step took less than half of the patience.
        self.was_brisk = False
        self._look: Callable[[], None] | None = None
        self._leaving: list[Slot] = []

    @property
    def is_under_way(self) -> bool:
        return self._look is not None

    @contextmanager
    def under_way(self, look: Callable[[], None]) -> Iterator[None]:
        """Be in a step, whose pauses call `look`. The rows of jobs evicted in it are removed at its end."""
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
        """Have these runs on the device. Nothing of them stays, even where the step is left between two siblings."""
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
        """Let the step's caller look. Raises StepGivenUpError when the step under way is not to go on."""
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
