"""Attempts, each with its own lease token. Tokens are drawn from a sequence, so a later attempt has a greater one."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, Sequence, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import Json, Row, check_known
from core.domain.jobs import AttemptOutcome

LEASE_TOKENS = Sequence("lease_tokens", metadata=Row.metadata)


class Attempt(Row):
    __tablename__ = "attempts"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        check_known("outcome", AttemptOutcome),
        CheckConstraint("(outcome is null) = (ended_at is null)", name="outcome_when_ended"),
        Index("ix_attempts_job_id", "job_id"),
        Index("ix_attempts_ended_at", "ended_at"),
        Index("ix_attempts_open", "tenant_id", postgresql_where=text("outcome is null")),
        Index("ix_attempts_succeeded", "ended_at", postgresql_where=text("outcome = 'succeeded'")),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    number: Mapped[int]
    lease_token: Mapped[int] = mapped_column(unique=True)
    worker_name: Mapped[str]
    # The charge at the claim. The use so far replaces it in the charge as soon as it is greater.
    entry_charge_seconds: Mapped[float]
    used_seconds: Mapped[float] = mapped_column(server_default="0")
    # Since when the job trains in its slot, and since when it is giving the slot to another tenant.
    stepping_at: Mapped[dt.datetime | None]
    lending_at: Mapped[dt.datetime | None]
    outcome: Mapped[str | None]
    error: Mapped[Json | None]
    started_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[dt.datetime | None]
    left_device_at: Mapped[dt.datetime | None]
