"""Objectives: what a job learns. An objective turns the log-probabilities of a slot's labels into the slot's loss.

The fused step takes one forward for all slots and hands every slot's label rows to that slot's objective, so jobs with
different objectives share a step. An objective sees no hidden state, no weight and no other slot.

A unit is what the loss is a mean over, such as a label token, or a pair of answers. The mean is over all units of the
optimizer batch, but a fused step may hold only a part of the batch. So an objective returns sums over the units of a
step, and counts the units of a batch separately. The step divides one by the other.

Shapes: M label rows of one slot in one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from worker.engine.examples import Example


@dataclass(frozen=True, eq=False)
class LabelRows:
    """One slot's label rows in a step: each label's negative log-probability, and whether it was the best guess.

    The M rows lie sequence by sequence in the order in which the slot's cursor drew them, `num_labels` of them each. So
    an objective that compares sequences, such as the two answers of a pair, finds them as neighbours.
    """

    nll_M: Tensor
    is_right_M: Tensor
    num_labels: Sequence[int]


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the units of one slot in a step, as scalars on the device. `loss` can be differentiated."""

    loss: Tensor
    num_right: Tensor


class Objective(Protocol):
    """What the step asks of an objective, which never waits for the device and remembers nothing between steps."""

    def count_units(self, examples: Sequence[Example]) -> int:
        """Return how many units these examples are. They are a whole optimizer batch, or a part of an evaluation."""

    def sum_units(self, rows: LabelRows) -> Sums:
        """Return the sums over the units that these rows are."""
