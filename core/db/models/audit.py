"""The audit log. Triggers write it, so no code path can forget to, and no runtime role can change it."""

from __future__ import annotations

import uuid

from sqlalchemy import Identity, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Json, Row


class AuditEntry(Row):
    """One change, written by a trigger in the transaction of the change. No runtime role may write to this table."""

    __tablename__ = "audit_entries"
    __table_args__ = (
        Index("ix_audit_entries_tenant_id_number", "tenant_id", "number"),
        Index("ix_audit_entries_subject", "subject"),
        Index(
            "ix_audit_entries_project_id",
            text("coalesce(after ->> 'project_id', before ->> 'project_id')"),
            postgresql_where=text("starts_with(action, 'checkpoint_permission.')"),
        ),
    )
    number: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    tenant_id: Mapped[uuid.UUID | None]
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    before: Mapped[Json]
    after: Mapped[Json]
    created_at: Mapped[CreatedAt]
