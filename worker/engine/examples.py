"""Inputs and outputs of the engine: plain values, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from core.domain.training import TrainingSpec
from worker.engine.errors import EngineError


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised row: `token_ids` [L] int64 and `is_label` [L] bool, True where a token is a target of the loss."""

    token_ids: npt.NDArray[np.int64]
    is_label: npt.NDArray[np.bool_]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @cached_property
    def num_labels(self) -> int:
        return int(self.is_label[1:].sum())


@dataclass(frozen=True)
class DrawnExample:
    """An example of an optimizer batch, and the seed of its dropout."""

    example: Example
    dropout_key: int


@dataclass(frozen=True, eq=False)
class EngineJob:
    """A job to train. Its caller chooses `slot_name`, the job's name in the engine until it is evicted.

    `share` weighs its tenant's part of the token budget, however many jobs the tenant has.
    """

    slot_name: str
    spec: TrainingSpec
    examples: Sequence[Example]
    tenant: str
    share: float = 1.0


@dataclass(frozen=True)
class StepMetrics:
    """One completed optimizer step. `epoch` counts the passes completed.

    `loss` and `token_accuracy` are means over the batch's `num_units`: for supervised jobs, its label tokens.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    token_accuracy: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_units: int
    is_epoch_end: bool
    is_last: bool
    is_skipped: bool


@dataclass(frozen=True)
class Evaluation:
    """The result of a validation: means over its `num_units`."""

    loss: float
    token_accuracy: float
    num_units: int


@dataclass(frozen=True)
class SlotReport:
    """What one step did for one job: the number of its tokens that it trained on, or scored for its validation."""

    slot_name: str
    num_tokens: int = 0
    num_scored_tokens: int = 0
    update: StepMetrics | None = None
    evaluation: Evaluation | None = None
    failure: EngineError | None = None

    @property
    def cost_tokens(self) -> float:
        """The job's part of the step's cost, in trained tokens. Through a frozen base, a forward is half the work."""
        return self.num_tokens + self.num_scored_tokens / 2
