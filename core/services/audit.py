"""Reads the audit log. Triggers write it, in the transactions of the changes themselves."""

from __future__ import annotations

import uuid

from sqlalchemy import select, tuple_

from core.db.models import AuditEntry
from core.db.session import OperatorSession
from core.domain.values import Page

_LAST_NUMBER = 2**63 - 1


def list_audit_entries(
    session: OperatorSession, tenant_id: uuid.UUID | None, *, before: int | None, limit: int
) -> Page[AuditEntry]:
    """Return changes, newest first, of one tenant or (for operators) of all.

    For one tenant the query compares and sorts by all columns of its index. Sorted by the number alone, it would scan
    the newer entries of all tenants.
    """
    last = _LAST_NUMBER if before is None else before - 1
    if tenant_id is None:
        query = select(AuditEntry).where(AuditEntry.number <= last)
    else:
        whole = tuple_(AuditEntry.tenant_id, AuditEntry.number)
        query = select(AuditEntry).where(AuditEntry.tenant_id >= tenant_id, whole <= tuple_(tenant_id, last))
        query = query.order_by(AuditEntry.tenant_id.desc())
    return Page.cut(session.scalars(query.order_by(AuditEntry.number.desc()).limit(limit + 1)).all(), limit)
