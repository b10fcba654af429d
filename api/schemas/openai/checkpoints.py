"""Checkpoints: the adapter as it was at a step of its job."""

from __future__ import annotations

from typing import Literal

from pydantic import with_config
from typing_extensions import TypedDict

from api.schemas.wire import STORED, Answer, unix_seconds
from core.db.models import Checkpoint
from core.domain.ids import IdKind, format_id


@with_config(STORED)
class CheckpointMetrics(TypedDict, total=False):
    """The numbers of a checkpoint's step. A number that was not measured is absent."""

    step: float
    """The optimizer step."""
    train_loss: float
    """The mean training loss of a token in that step, in nats."""
    train_mean_token_accuracy: float
    """The part of the step's learnt tokens that the model predicted, from 0 to 1."""
    full_valid_loss: float
    """The mean loss of a token of the whole validation file, in nats."""
    full_valid_mean_token_accuracy: float
    """The part of the validation file's tokens that the model predicted, from 0 to 1."""


class CheckpointObject(Answer):
    """A checkpoint of a job. It can be downloaded, shared and served like the finished adapter."""

    id: str
    """The checkpoint's id, which begins with `ftckpt_`."""
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    """The kind of this object."""
    created_at: int
    """When the checkpoint was stored, in Unix seconds."""
    fine_tuning_job_id: str
    """The id of the job that the checkpoint is of."""
    fine_tuned_model_checkpoint: str
    """The checkpoint's model name, `ft:<base>:<tenant>:<suffix>:<digits>:ckpt-step-<step>`."""
    step_number: int
    """The optimizer step after which the checkpoint was taken."""
    metrics: CheckpointMetrics
    """The numbers of that step."""

    @classmethod
    def of(cls, row: Checkpoint) -> CheckpointObject:
        metrics = {
            "step": row.metrics.get("step"),
            "train_loss": row.metrics.get("train_loss"),
            "train_mean_token_accuracy": row.metrics.get("train_accuracy"),
            "full_valid_loss": row.metrics.get("valid_loss"),
            "full_valid_mean_token_accuracy": row.metrics.get("valid_mean_token_accuracy"),
        }
        return cls(
            id=format_id(IdKind.CHECKPOINT, row.id),
            created_at=unix_seconds(row.created_at),
            fine_tuning_job_id=format_id(IdKind.JOB, row.job_id),
            fine_tuned_model_checkpoint=row.model_name,
            step_number=row.step,
            metrics={name: value for name, value in metrics.items() if value is not None},
        )
