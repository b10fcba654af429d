"""One slot's validation, scored in parts between the fused steps, so that no tenant waits for another's data.

The slot does not train until the last part is scored, so all examples are scored with the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from worker.engine.examples import Evaluation, Example
from worker.engine.objectives import Sums


@dataclass(frozen=True)
class Score:
    """The sums over some scored examples, as numbers on the host."""

    loss_sum: float
    num_right: int
    num_units: int

    @classmethod
    def of(cls, sums: Sums, *, num_units: int) -> Score:
        """Read the sums off the device. Raises torch.OutOfMemoryError."""
        loss_sum, num_right = torch.stack([sums.loss, sums.num_right]).tolist()
        return cls(loss_sum, int(num_right), num_units)


class PendingEvaluation:
    """The examples still to be scored, in their order, and the sums over those that were."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._position = 0
        self._loss_sum = 0.0
        self._num_right = 0
        self._num_units = 0

    @property
    def is_complete(self) -> bool:
        return self._position == len(self._examples)

    def next_part(self, max_tokens: int) -> Sequence[Example]:
        """Return the next examples, of at most this many tokens together, or a single longer one."""
        end, num_tokens = self._position, 0
        while end < len(self._examples):
            num_tokens += self._examples[end].num_tokens
            if num_tokens > max_tokens and end > self._position:
                break
            end += 1
        return self._examples[self._position : end]

    def count(self, part: Sequence[Example], scores: Sequence[Score]) -> None:
        """Add up the scores of the part that `next_part` returned last."""
        self._position += len(part)
        for score in scores:
            self._loss_sum += score.loss_sum
            self._num_right += score.num_right
            self._num_units += score.num_units

    def result(self) -> Evaluation:
        return Evaluation(self._loss_sum / self._num_units, self._num_right / self._num_units, self._num_units)
