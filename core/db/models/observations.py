"""Observations: the numbers of each step, which make a job's training curves, and their summaries for charts.

Their tables are called `metrics` and `metric_blocks`, as on the wire.
"""

from __future__ import annotations

import uuid

from sqlalchemy import ForeignKeyConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Row


class Observation(Row):
    __tablename__ = "metrics"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),)
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    lease_token: Mapped[int]
    train_loss: Mapped[float]
    train_token_accuracy: Mapped[float] = mapped_column("train_accuracy")
    learning_rate: Mapped[float]
    grad_norm: Mapped[float]
    num_tokens: Mapped[int]
    valid_loss: Mapped[float | None]
    valid_token_accuracy: Mapped[float | None] = mapped_column("valid_accuracy")
    created_at: Mapped[CreatedAt]


class ObservationBlock(Row):
    """The summary of 32 steps of a job. `last_step` is the last of them, a multiple of 32.

    A trigger adds the row together with its last step; if this step was skipped, there is no row. Of several steps with
    the same loss the summary names the last.
    """

    __tablename__ = "metric_blocks"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], ondelete="CASCADE"),)
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    last_step: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    num_steps: Mapped[int]
    least_loss: Mapped[float]
    least_step: Mapped[int]
    greatest_loss: Mapped[float]
    greatest_step: Mapped[int]
    evaluated_step: Mapped[int | None]
