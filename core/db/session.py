"""Transactions: the only place that commits, and the place that tells PostgreSQL whose transaction it is.

Row-level security reads the settings `app.tenant_id` and `app.key_id`, the audit log reads `app.actor`. They are set
locally at the begin of every transaction and vanish with it, so a pooled connection never carries one tenant's identity
to the next borrower.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransaction

# What is raised when the database is away, comes back, or has ended the connection; the transaction may be tried again.
DATABASE_ERRORS = (OperationalError, InterfaceError, InternalError, PoolTimeoutError)
# A process that was stopped inside a transaction loses it, so that its row locks hold up the others no longer.
_IDLE_TRANSACTION_MILLISECONDS = 5000


def connect(database_url: str, *, pool_size: int = 5, lock_timeout_seconds: float = 0) -> Engine:
    """Return an engine for a `postgresql://` URL. A dead server is noticed within seconds, not minutes.

    `lock_timeout_seconds` bounds each wait for another transaction; it ends in an OperationalError. 0 waits for ever.
    """
    return create_engine(
        database_url.replace("postgresql://", "postgresql+psycopg://", 1),
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=5,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 5,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "options": f"-c idle_in_transaction_session_timeout={_IDLE_TRANSACTION_MILLISECONDS}"
            f" -c lock_timeout={int(lock_timeout_seconds * 1000)}",
        },
    )


@contextmanager
def tenant_transaction(engine: Engine, tenant_id: uuid.UUID, *, actor: str = "") -> Iterator[Session]:
    """Open a transaction that sees and writes this tenant's rows only. `actor` is who the audit log will name."""
    with _transaction(engine, {"app.tenant_id": str(tenant_id), "app.actor": actor}) as session:
        yield session


@contextmanager
def operator_transaction(engine: Engine, *, actor: str) -> Iterator[Session]:
    """Open a transaction in the operator's role, which sees every tenant's settings and nobody's files or jobs."""
    with _transaction(engine, {"role": "espalier_operator", "app.actor": actor}) as session:
        yield session


@contextmanager
def key_transaction(engine: Engine, key_id: str) -> Iterator[Session]:
    """Open a transaction that sees one API key's row only: whose tenant it is is not yet known."""
    with _transaction(engine, {"app.key_id": key_id}) as session:
        yield session


def enter_tenant(session: Session, tenant_id: uuid.UUID) -> None:
    """Let a transaction that has found out whose key it holds see that tenant's rows too."""
    session.info["app.tenant_id"] = str(tenant_id)
    _announce(session.connection(), {"app.tenant_id": str(tenant_id)})


@contextmanager
def service_transaction(engine: Engine) -> Iterator[Session]:
    """Open a transaction with no tenant: what it sees is what its database role is granted."""
    with _transaction(engine, {}) as session:
        yield session


@contextmanager
def _transaction(engine: Engine, identity: dict[str, str]) -> Iterator[Session]:
    with Session(engine, info=dict(identity), expire_on_commit=False) as session:
        yield session
        session.commit()


@event.listens_for(Session, "after_begin")
def _announce_identity(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    if session.info:
        _announce(connection, session.info)


def _announce(connection: Connection, identity: Mapping[str, str]) -> None:
    settings = ", ".join(f"set_config(:name{n}, :value{n}, true)" for n in range(len(identity)))
    values = {f"name{n}": name for n, name in enumerate(identity)} | {
        f"value{n}": value for n, value in enumerate(identity.values())
    }
    connection.execute(text(f"select {settings}"), values)


def ping(engine: Engine) -> None:
    """Ask the database for a sign of life. Raises its OperationalError."""
    with engine.connect() as connection:
        connection.execute(text("select 1"))
