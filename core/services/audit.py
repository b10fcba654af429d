"""The audit log, as it is read. It is written by triggers, in the transactions of the changes themselves."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db.models import AuditEntry
from core.services.pages import Page


def list_audit_entries(
    session: Session, tenant_id: uuid.UUID | None, *, before: int | None, limit: int
) -> Page[AuditEntry]:
    """Return changes, newest first, of one tenant or (for operators) of all."""
    query = select(AuditEntry)
    if tenant_id is not None:
        query = query.where(AuditEntry.tenant_id == tenant_id)
    if before is not None:
        query = query.where(AuditEntry.number < before)
    rows: Sequence[AuditEntry] = session.scalars(query.order_by(AuditEntry.number.desc()).limit(limit + 1)).all()
    return Page.cut(rows, limit)
