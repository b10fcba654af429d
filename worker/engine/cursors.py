"""A cursor: which examples a slot learns from next. It uses no tensor, no bank and no other slot.

The engine asks a cursor for the current optimizer batch, for the examples of it that wait, and for the learning rate of
the update that ends the batch. It tells the cursor how many examples a fused step has trained on, and when the batch is
done. Another source of examples than a dataset is another class with these members. Steps may cut a batch between any
two drawn examples, and never within one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from core.domain.training import TrainingSpec, count_steps, learning_rate_at, order_examples
from worker.engine.examples import DrawnExample, Example
from worker.engine.seeds import stable_hash


class DatasetCursor:
    """A job's place in its dataset: every epoch visits all examples, in an order drawn from the job's seed.

    `step` counts the optimizer batches that are done, `position` the examples of the current one that are.
    """

    def __init__(self, spec: TrainingSpec, examples: Sequence[Example]) -> None:
        self.step = 0
        self.position = 0
        self.total_steps = count_steps(spec, len(examples))
        self.steps_per_epoch = math.ceil(len(examples) / spec.batch_size)
        self._spec = spec
        self._examples = examples
        # Shuffling a large dataset takes a while, so the order of an epoch is kept; so is the batch of a step.
        self._order: tuple[int, Sequence[int]] = (-1, ())
        self._batch: tuple[int, list[DrawnExample]] = (-1, [])

    @property
    def num_examples(self) -> int:
        return len(self._examples)

    @property
    def epoch(self) -> int:
        """The epoch of the current batch; 0 is the first."""
        return self.step // self.steps_per_epoch

    @property
    def is_finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def is_batch_complete(self) -> bool:
        return self.position == len(self.batch())

    @property
    def learning_rate(self) -> float:
        """The learning rate of the update that the current batch ends in."""
        return learning_rate_at(self._spec, self.step + 1, self.total_steps)

    def batch(self) -> list[DrawnExample]:
        """Return the current optimizer batch."""
        if self._batch[0] != self.step:
            self._batch = (self.step, self._draw_batch())
        return self._batch[1]

    def waiting(self) -> list[DrawnExample]:
        """Return those of the current batch that no fused step has trained on yet."""
        return [] if self.is_finished else self.batch()[self.position :]

    def advance(self) -> None:
        """Start the next batch."""
        self.step += 1
        self.position = 0

    def _draw_batch(self) -> list[DrawnExample]:
        if self._order[0] != self.epoch:
            self._order = (self.epoch, order_examples(self._spec.seed, self.epoch, self.num_examples))
        start = (self.step % self.steps_per_epoch) * self._spec.batch_size
        return [
            DrawnExample(self._examples[index], stable_hash(self._spec.seed, self.epoch, index))
            for index in self._order[1][start : start + self._spec.batch_size]
        ]
