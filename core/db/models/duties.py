"""The state of the service's duties: which process does each, how far it has come, and which rows it leaves alone."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Row, check_known
from core.domain.duties import Duty


class Leader(Row):
    """The process that does a duty for the whole cluster. `name` is the duty."""

    __tablename__ = "leaders"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    lease_until: Mapped[dt.datetime]


class RetentionMark(Row):
    """How far a duty has come in walking jobs or attempts in the order in which they ended."""

    __tablename__ = "retention_marks"
    kind: Mapped[str] = mapped_column(primary_key=True)
    finished_at: Mapped[dt.datetime]
    job_id: Mapped[uuid.UUID]


class SetAside(Row):
    """A row on which a duty has failed. The duty leaves it alone until `retry_at`."""

    __tablename__ = "set_asides"
    __table_args__ = (
        check_known("duty", Duty),
        Index("ix_set_asides_tenant_id", "tenant_id"),
    )
    duty: Mapped[str] = mapped_column(primary_key=True)
    row_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    reason: Mapped[str]
    num_failures: Mapped[int] = mapped_column(server_default="1")
    retry_at: Mapped[dt.datetime]
    created_at: Mapped[CreatedAt]
