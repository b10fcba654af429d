"""The step under way: what its linears need to know of it, and the places at which it can be left.

A step of a slow device takes a minute and more, and an order to stop a job does not wait for its end. So linears and
loss call `pause` between their products: in no case is more than one product of one layer between two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from worker.engine.runs import Run
from worker.engine.slots import Slot


class StepGivenUpError(Exception):
    """The step under way is of no use to anyone in it any more, or has kept for too long one who left."""


class StepContext:
    """One object, shared by all of an engine's linears. `pause` is the engine's, and may raise StepGivenUpError."""

    def __init__(self, device: torch.device, *, pause: Callable[[], None]) -> None:
        # Makes the products differentiable even where their input is not, as in the first layer.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.pause = pause
        self.runs: tuple[Run, ...] = ()
        self.slots: tuple[Slot, ...] = ()
        # By its linear's name, what waits to be taken: the rows that were multiplied, and the outputs.
        self.waiting: dict[str, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def running(self, runs: tuple[Run, ...]) -> Iterator[None]:
        """Be in a step of these runs. Nothing of it stays, though it was left between two siblings."""
        self.runs = runs
        self.slots = tuple(part.slot for run in runs for part in run.parts)
        try:
            yield
        finally:
            self.runs, self.slots = (), ()
            self.waiting.clear()
