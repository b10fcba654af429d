"""Supervised fine-tuning: the cross-entropy of every label token. The unit is the label token."""

from __future__ import annotations

from collections.abc import Sequence

from worker.engine.examples import Example
from worker.engine.objectives import LabelRows, Sums


class CrossEntropy:
    """The mean negative log-probability of the labels, and how many of them were the best guess."""

    def count_units(self, examples: Sequence[Example]) -> int:
        return sum(example.num_labels for example in examples)

    def sum_units(self, rows: LabelRows) -> Sums:
        return Sums(loss=rows.nll_M.sum(), num_right=rows.is_right_M.sum())
