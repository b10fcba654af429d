"""Locks that last until the end of a transaction. Under such a lock a tenant's rows are counted before one is added."""

from __future__ import annotations

import uuid

from sqlalchemy import ColumnElement, Text, bindparam, func, select
from sqlalchemy.orm import Session

_LOCK = select(func.pg_advisory_xact_lock(func.hashtextextended(bindparam("name", type_=Text), 0)))


def lock(session: Session, name: str) -> None:
    """Wait until no other transaction holds this name, and hold it until the end of this one."""
    session.execute(_LOCK, {"name": name})


def lock_for_tenant(session: Session, tenant_id: uuid.UUID, *, purpose: str) -> None:
    """The same as `lock`, for one purpose of one tenant.

    It is an advisory lock. A lock on the tenant's row would need the right to change it, and would wait for claims.
    """
    lock(session, f"{purpose}:{tenant_id}")


def shared_lock_call(name: ColumnElement[str]) -> ColumnElement[None]:
    """Return the call that holds a name together with other sharers, and waits for one that holds it alone."""
    return func.pg_advisory_xact_lock_shared(func.hashtextextended(name, 0))
