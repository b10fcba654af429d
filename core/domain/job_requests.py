"""What a tenant asks of a job. Values may still be "auto": core.services.submissions resolves them to numbers."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from pydantic import Field

from core.domain import bounds
from core.domain.training import LearningRateSchedule, Quantization
from core.domain.values import Frozen


class JobRequest(Frozen):
    """A request to train one adapter, with its form checked. None stands for "auto" or a default."""

    base_model_id: str
    training_file_id: uuid.UUID
    validation_file_id: uuid.UUID | None = None
    suffix: str | None = None
    seed: Annotated[int, bounds.SEED.field] | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    priority: Annotated[int, bounds.PRIORITY.field] = 0
    quantization: Quantization | None = None
    n_epochs: Annotated[int, bounds.EPOCHS.field] | None = None
    batch_size: Annotated[int, bounds.BATCH_SIZE.field] | None = None
    learning_rate_multiplier: Annotated[float, bounds.LEARNING_RATE_MULTIPLIER.field] | None = None
    learning_rate: Annotated[float, bounds.LEARNING_RATE.field] | None = None
    learning_rate_schedule: LearningRateSchedule = "cosine"
    warmup_ratio: Annotated[float, bounds.WARMUP_RATIO.field] = 0.05
    weight_decay: Annotated[float, bounds.WEIGHT_DECAY.field] = 0.0
    max_grad_norm: Annotated[float, bounds.GRAD_NORM.field] = 1.0
    max_seq_len: Annotated[int, bounds.SEQ_LEN.field] | None = None
    rank: int = 16  # bounded by the base, not here
    alpha: Annotated[float, bounds.ALPHA.field] | None = None
    dropout: Annotated[float, bounds.DROPOUT.field] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
