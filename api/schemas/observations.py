"""Answers that OpenAI's API has no objects for: the numbers of a job's steps, and its log lines."""

from __future__ import annotations

from typing import Any, Literal

from api.schemas.wire import Answer
from core.db.models import LogLine, Observation
from core.domain.ids import IdKind, format_id
from core.services.observations import ObservationSeries


class MetricObject(Answer):
    """The numbers of one training step."""

    step: int
    """The optimizer step. The first step is 1."""
    train_loss: float
    """The mean training loss of a token, in nats."""
    train_mean_token_accuracy: float
    """The part of the learnt tokens that the model predicted, from 0 to 1."""
    learning_rate: float
    """The learning rate of the step."""
    grad_norm: float
    """The norm of the gradient before it was clipped."""
    num_tokens: int
    """The number of tokens that the step was trained on."""
    full_valid_loss: float | None
    """The mean loss of a token of the whole validation file, in nats. Null if the step was not evaluated."""
    full_valid_mean_token_accuracy: float | None
    """The part of the validation file's tokens that the model predicted. Null if the step was not evaluated."""

    @classmethod
    def of(cls, row: Observation) -> MetricObject:
        return cls(
            step=row.step,
            train_loss=row.train_loss,
            train_mean_token_accuracy=row.train_token_accuracy,
            learning_rate=row.learning_rate,
            grad_norm=row.grad_norm,
            num_tokens=row.num_tokens,
            full_valid_loss=row.valid_loss,
            full_valid_mean_token_accuracy=row.valid_token_accuracy,
        )


class MetricSeriesObject(Answer):
    """The numbers of a job's steps, thinned out to what a chart can show."""

    object: Literal["fine_tuning.job.metrics"] = "fine_tuning.job.metrics"
    """The kind of this object."""
    data: list[MetricObject]
    """The steps, in order."""
    num_steps: int
    """The number of recorded steps that `data` stands for."""
    is_thinned: bool
    """Whether `data` holds fewer steps than were recorded."""

    @classmethod
    def of(cls, series: ObservationSeries) -> MetricSeriesObject:
        rows = [MetricObject.of(row) for row in series.rows]
        return cls(data=rows, num_steps=series.num_steps, is_thinned=series.is_thinned)


class LogLineObject(Answer):
    """One line that a worker wrote about a job: a name and numbers, never the words of a row."""

    id: str
    """The line's id, which begins with `ftlog-`."""
    object: Literal["fine_tuning.job.log_line"] = "fine_tuning.job.log_line"
    """The kind of this object."""
    created_at: float
    """When the line was written, in Unix seconds with fractions."""
    attempt: int
    """The attempt that the line is of. A job's first attempt is 1."""
    level: Literal["info", "warn", "error"]
    """How serious the line is. Every line is `info` at present.

    - `info`: Something happened.
    - `warn`: Kept for what is worth a look.
    - `error`: Kept for what went wrong.
    """
    name: str
    """What happened, a stable word for programs, such as `artifact.uploaded`."""
    data: dict[str, Any]
    """The line's values. Which there are depends on `name`."""

    @classmethod
    def of(cls, row: LogLine) -> LogLineObject:
        return cls(
            id=format_id(IdKind.LOG_LINE, row.id),
            created_at=row.created_at.timestamp(),
            attempt=row.attempt_number,
            level=row.level,
            name=row.name,
            data=row.details,
        )
