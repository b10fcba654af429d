"""Idempotency keys: which job each submission with a key has made."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, func
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import Row


class IdempotencyKey(Row):
    __tablename__ = "idempotency_keys"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"], ondelete="CASCADE"),
        CheckConstraint("length(key) between 1 and 255", name="key_length"),
        CheckConstraint("length(request_hash) = 32", name="request_hash_length"),
    )
    tenant_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_hash: Mapped[bytes]
    job_id: Mapped[uuid.UUID]
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now(), index=True)
