"""Locks that last as long as a transaction: what counts rows before it adds one is done by one at a time a tenant."""

from __future__ import annotations

import uuid

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session


def lock_for_tenant(session: Session, tenant_id: uuid.UUID, *, purpose: str) -> None:
    """Wait until no other transaction holds this purpose of this tenant, and hold it until the end of this one.

    An advisory lock: locking the tenant's row would need the right to change it, and would wait for claims.
    """
    session.execute(select(lock_call(f"{purpose}:{tenant_id}")))


def shared_lock_call(name: ColumnElement[str] | str) -> ColumnElement[None]:
    """Return the call that holds a lock of this name, beside others that share it, until the transaction ends."""
    return func.pg_advisory_xact_lock_shared(func.hashtextextended(name, 0))


def lock_call(name: str) -> ColumnElement[None]:
    """As `shared_lock_call`, beside nobody."""
    return func.pg_advisory_xact_lock(func.hashtextextended(name, 0))
