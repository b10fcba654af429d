"""The training that a job asks for, with every "auto" already a number.

A `TrainingSpec` is resolved once, when the job is submitted. It is stored in the row, shown on the wire and given
unchanged to the engine, so that every attempt of a job trains the same.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from core.domain import bounds
from core.domain.values import Frozen

LearningRateSchedule = Literal["linear", "cosine", "constant"]
Quantization = Literal["nf4"]

ALL_LINEAR = "all-linear"
BASE_LEARNING_RATE = 2e-4
# A job ends after this many steps in a row whose gradient is not finite.
MAX_SKIPPED_STEPS = 3
_SMALL_DATASET, _MEDIUM_DATASET = 10_000, 50_000


class AdapterConfig(Frozen):
    """The shape of one LoRA adapter. `target_modules` are the last parts of module names, such as "q_proj"."""

    rank: Annotated[int, bounds.RANK.field]
    alpha: float = Field(gt=0, le=bounds.ALPHA.greatest)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = Field(min_length=1)
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor on B(A(x)): alpha/r (Hu et al. 2021), or alpha/sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class TrainingSpec(Frozen):
    """One job's training, resolved. `batch_size` is in examples for each optimizer step, however these are cut to fit.

    Requests may have tighter lower bounds than this class, which also reads jobs that were made before those bounds.
    """

    adapter: AdapterConfig
    n_epochs: Annotated[int, bounds.EPOCHS.field]
    batch_size: Annotated[int, bounds.BATCH_SIZE.field]
    learning_rate: float = Field(gt=0, le=bounds.LEARNING_RATE.greatest)
    learning_rate_multiplier: float = Field(default=1.0, gt=0, le=bounds.LEARNING_RATE.greatest / BASE_LEARNING_RATE)
    learning_rate_schedule: LearningRateSchedule = "cosine"
    warmup_ratio: Annotated[float, bounds.WARMUP_RATIO.field] = 0.05
    weight_decay: Annotated[float, bounds.WEIGHT_DECAY.field] = 0.0
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0, le=bounds.GRAD_NORM.greatest)
    max_seq_len: Annotated[int, bounds.SEQ_LEN.field]
    seed: Annotated[int, bounds.SEED.field]


def count_steps(spec: TrainingSpec, num_examples: int) -> int:
    """Return the optimizer steps of the whole job. The last batch of an epoch may be smaller."""
    return spec.n_epochs * math.ceil(num_examples / spec.batch_size)


def learning_rate_at(spec: TrainingSpec, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (1 is the first) of `total_steps`.

    Warm-up rises linearly over the first `warmup_ratio` of the steps. Then the rate stays, or falls to 0 just after the
    last step, linearly or along half a cosine (Loshchilov and Hutter 2017).
    """
    warmup_steps = math.ceil(spec.warmup_ratio * total_steps)
    if step <= warmup_steps:
        return spec.learning_rate * step / warmup_steps
    remaining = (total_steps - step + 1) / max(1, total_steps - warmup_steps)
    match spec.learning_rate_schedule:
        case "constant":
            return spec.learning_rate
        case "linear":
            return spec.learning_rate * remaining
        case "cosine":
            # (1 + cos(pi (1 - x))) / 2, without the difference that would round to 0 in the last of many steps
            return spec.learning_rate * math.sin(math.pi / 2 * remaining) ** 2


def order_examples(seed: int, epoch: int, num_examples: int) -> Sequence[int]:
    """Return the order of the examples in epoch `epoch` (0 is the first). It is the same on every machine.

    It takes eight bytes an example.
    """
    order = array("q", range(num_examples))
    random.Random(f"{seed}:{epoch}").shuffle(order)  # noqa: S311 (a shuffle, not a secret)
    return order


def resolve_epochs(num_examples: int) -> int:
    """Return `n_epochs` for "auto": more passes over small sets, one over large ones."""
    if num_examples <= _SMALL_DATASET:
        return 3
    return 2 if num_examples <= _MEDIUM_DATASET else 1


def resolve_batch_size(num_examples: int) -> int:
    """Return `batch_size` for "auto": about 1/50 of the examples, a power of two between 1 and 32."""
    return 1 << min(5, max(0, int(math.log2(max(1, num_examples // 50)))))


def resolve_alpha(rank: int) -> float:
    """Return `alpha` if only the rank is given: twice the rank, so that the adapter's scale does not depend on it."""
    return float(min(2 * rank, bounds.ALPHA.greatest))


def resolve_learning_rate(multiplier: float) -> float:
    """Return the absolute learning rate for a `learning_rate_multiplier`; "auto" is a multiplier of 1."""
    return BASE_LEARNING_RATE * multiplier
