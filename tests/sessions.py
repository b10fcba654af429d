"""The session of tests that call services of any role in one transaction, mostly as the superuser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

from core.db.session import (
    AuditorSession,
    OperatorSession,
    OwnerSession,
    ServiceSession,
    TenantSession,
    _transaction,
)


class AnyRoleSession(TenantSession, OperatorSession, AuditorSession, OwnerSession, ServiceSession):
    """Sees and writes what the role that logged in may, and lets every service be tried in it."""


@contextmanager
def any_role_transaction(engine: Engine) -> Iterator[AnyRoleSession]:
    """Open a transaction as `service_transaction` does, for services that another role would call."""
    with _transaction(AnyRoleSession, engine, {}) as session:
        yield session
