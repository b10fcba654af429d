"""Metrics of a job, thinned out so that a chart of any job has a bounded number of points.

The range of steps is cut into equal buckets. Each keeps the step with the least training loss, the one with the
greatest (so that no spike is lost, as an average would lose it) and the last one that was evaluated.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, func, select, union
from sqlalchemy.orm import Session

from core.db.models import Metric

_ROWS_A_BUCKET = 3


@dataclass(frozen=True)
class StepRange:
    """Steps `first` to `last`, both included."""

    first: int
    last: int


@dataclass(frozen=True)
class MetricSeries:
    """`rows` stand for the `num_steps` that there are in the range; `is_thinned` where they are fewer."""

    rows: tuple[Metric, ...]
    num_steps: int

    @property
    def is_thinned(self) -> bool:
        return len(self.rows) < self.num_steps


def read_metrics(
    session: Session, tenant_id: uuid.UUID, *, job_id: uuid.UUID, steps: StepRange, points: int
) -> MetricSeries:
    """Return at most `points` (3 at least) steps of a job within a range, in order."""
    own = (Metric.tenant_id == tenant_id, Metric.job_id == job_id, Metric.step.between(steps.first, steps.last))
    counted = select(func.count(), func.min(Metric.step), func.max(Metric.step)).where(*own)
    num_steps, first, last = session.execute(counted).one()
    wanted = select(Metric).where(*own).order_by(Metric.step)
    if num_steps > points:
        kept = _kept_steps(own, StepRange(first, last), num_buckets=points // _ROWS_A_BUCKET)
        wanted = wanted.where(Metric.step.in_(kept))
    rows: Sequence[Metric] = session.scalars(wanted).all()
    return MetricSeries(rows=tuple(rows), num_steps=num_steps)


def _kept_steps(own: tuple[ColumnElement[bool], ...], steps: StepRange, *, num_buckets: int) -> Select[tuple[int]]:
    width = steps.last - steps.first + 1
    bucket = (Metric.step - steps.first) * num_buckets // width
    orders = (Metric.train_loss, Metric.train_loss.desc(), Metric.valid_loss.is_(None))
    picks = [
        select(Metric.step).distinct(bucket).where(*own).order_by(bucket, order, Metric.step.desc()).subquery()
        for order in orders
    ]
    return select(union(*(select(pick.c.step) for pick in picks)).subquery().c.step)
