"""Answers that OpenAI's API has no objects for: a job's metrics and log lines."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from core.db.models import LogLine, Observation
from core.domain.ids import IdKind, format_id
from core.services.observations import ObservationSeries


class MetricObject(BaseModel):
    step: int
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None

    @classmethod
    def of(cls, row: Observation) -> MetricObject:
        return cls(
            step=row.step,
            train_loss=row.train_loss,
            train_mean_token_accuracy=row.train_accuracy,
            learning_rate=row.learning_rate,
            grad_norm=row.grad_norm,
            num_tokens=row.num_tokens,
            full_valid_loss=row.valid_loss,
            full_valid_mean_token_accuracy=row.valid_accuracy,
        )


class MetricSeriesObject(BaseModel):
    """`data` stands for `num_steps` recorded steps; `is_thinned` says that it holds fewer of them."""

    object: str = "fine_tuning.job.metrics"
    data: list[MetricObject]
    num_steps: int
    is_thinned: bool

    @classmethod
    def of(cls, series: ObservationSeries) -> MetricSeriesObject:
        rows = [MetricObject.of(row) for row in series.rows]
        return cls(data=rows, num_steps=series.num_steps, is_thinned=series.is_thinned)


class LogLineObject(BaseModel):
    id: str
    object: str = "fine_tuning.job.log_line"
    created_at: float
    attempt: int
    level: str
    name: str
    data: dict[str, Any]

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
