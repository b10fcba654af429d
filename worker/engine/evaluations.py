"""One slot's validation, scored a part at a time between the fused steps, so that no tenant waits for another's rows.

The slot does not train until the last part is scored: every row is judged by the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from worker.engine.examples import Evaluation, Example
from worker.engine.losses import RowLosses


class PendingEvaluation:
    """The rows still to be scored, in their order, and the sums over those that were."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._position = 0
        self._loss_sum = 0.0
        self._num_right = 0
        self._num_labels = 0

    @property
    def is_complete(self) -> bool:
        return self._position == len(self._examples)

    def next_part(self, max_tokens: int) -> Sequence[Example]:
        """Return the next rows, of at most so many tokens together, or a single longer one."""
        end, num_tokens = self._position, 0
        while end < len(self._examples):
            num_tokens += self._examples[end].num_tokens
            if num_tokens > max_tokens and end > self._position:
                break
            end += 1
        return self._examples[self._position : end]

    def count(self, part: Sequence[Example], scored: Sequence[RowLosses]) -> None:
        """Add up what was found of the part that `next_part` gave last."""
        self._position += len(part)
        for losses in scored:
            self._loss_sum += float(losses.weighted_sum)
            self._num_right += int(losses.is_right_M.sum())
            self._num_labels += len(losses.losses_M)

    def result(self) -> Evaluation:
        return Evaluation(self._loss_sum / self._num_labels, self._num_right / self._num_labels, self._num_labels)
