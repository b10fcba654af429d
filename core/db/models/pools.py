"""Pools: how many jobs of each tenant wait in each pool, and what was measured of each pool."""

from __future__ import annotations

import uuid

from sqlalchemy import CheckConstraint, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import Row


class Queue(Row):
    """How many jobs of a tenant wait in a pool, and the tenant's rank in fair share. Triggers keep these columns.

    `num_paused` counts paused jobs and running jobs that are about to pause.
    """

    __tablename__ = "queues"
    __table_args__ = (
        CheckConstraint("num_queued >= 0", name="num_queued_not_negative"),
        CheckConstraint("num_paused >= 0", name="num_paused_not_negative"),
        Index("ix_queues_waiting", "pool", "rank", "tenant_id", postgresql_where=text("num_queued > 0")),
        Index("ix_queues_new", "tenant_id", postgresql_where=text("is_new")),
    )
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    pool: Mapped[str] = mapped_column(primary_key=True)
    num_queued: Mapped[int]
    num_paused: Mapped[int] = mapped_column(server_default="0")
    rank: Mapped[float]
    # A submission found the queue empty, and the tenant's account must still be levelled.
    is_new: Mapped[bool] = mapped_column(server_default=text("false"))


class Pool(Row):
    """Measurements of a pool: GPU-seconds that one job uses for a step, and seconds that loading its base takes."""

    __tablename__ = "pools"
    __table_args__ = (CheckConstraint("step_seconds >= 0 and load_seconds >= 0", name="seconds_not_negative"),)
    name: Mapped[str] = mapped_column(primary_key=True)
    step_seconds: Mapped[float | None]
    load_seconds: Mapped[float | None]
