"""Objectives: what a job learns. An objective turns the log-probabilities of a slot's labels into the slot's loss.

The fused step takes one forward for all slots and hands every slot's label rows to that slot's objective, so jobs with
different objectives share a step. An objective sees no hidden state, no weight and no other slot. Its loss is a mean
over the units of the whole optimizer batch, and a fused step may hold a part of the batch only: an objective therefore
returns sums, and counts the units of the whole batch by themselves. A unit is what the mean is taken over, such as a
label token, or a pair of answers.

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

    The M rows lie sequence by sequence in the order in which the slot's cursor drew them, `num_labels` of them each.
    Sequences that are drawn together, such as the two answers of a pair, are neighbours.
    """

    nll_M: Tensor
    is_right_M: Tensor
    num_labels: Sequence[int]


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the units of one slot in a step, on the device. `loss` can be differentiated."""

    loss: Tensor
    num_right: Tensor


class Objective(Protocol):
    """What the step asks for. It waits for the device nowhere, and keeps nothing from one step to the next."""

    def count_units(self, examples: Sequence[Example]) -> int:
        """Return how many units these examples are, which are all of an optimizer batch or of an evaluation's part."""

    def sum_units(self, rows: LabelRows) -> Sums:
        """Return the sums over the units in these rows, whether one step holds them all or only a part."""
