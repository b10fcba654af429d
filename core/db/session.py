"""Transactions: the only module that commits, and the one that tells PostgreSQL for whom a transaction is.

Row-level security reads the settings `app.tenant_id` and `app.key_id`, and the audit log reads `app.actor`. They are
set locally at the begin of every transaction and vanish at its end. So a pooled connection never carries one tenant's
identity to its next user, whether the pool is ours or a pooler's. They travel with the BEGIN in one round trip, because
every request pays for this.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

import psycopg
from psycopg.pq import Escaping, ExecStatus, TransactionStatus
from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event, text
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransaction

from core.database_urls import read_url
from core.db.connections import CONNECTION_ARGUMENTS, SilentServerError
from core.db.roles import AUDITOR, OPERATOR


class DamagedRowError(InternalError):
    """PostgreSQL has met damaged data or an internal fault. Where one row was asked for, it is this row's fault.

    It is also one of DATABASE_ERRORS: code that asked for no particular row tries again, and ends no process for it.
    """


# Raised when the database is away, comes back or has ended the connection. The transaction may be tried again. Code
# that uses psycopg directly meets psycopg's own errors. No other module lists these: code that catches one must catch
# all.
DATABASE_ERRORS = (
    OperationalError,
    InterfaceError,
    InternalError,
    PoolTimeoutError,
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.InternalError,
    SilentServerError,
)
# SQLSTATEs: a read-only transaction, and a server that stops, crashes or starts. After a failover every pooled
# connection leads to such a server, and only a new connection finds the new one.
_MOVED_STATES = ("25006", "57P01", "57P02", "57P03")
_TOO_LONG_STATES = ("57014", "25P04")  # a statement was cancelled, mostly by statement_timeout; a whole transaction
# PostgreSQL ends the transaction of a suspended process after this time, so that its row locks no longer block others.
_IDLE_TRANSACTION_MILLISECONDS = 5000
_INTERNAL_ERRORS = "XX"  # the class of SQLSTATEs of damaged data and indexes, and of PostgreSQL's internal faults
_DATA_EXCEPTIONS = "22"  # the class of SQLSTATEs whose messages quote the value: "invalid input syntax for ..."
# By its estimates PostgreSQL would rather scan the newest rows of all tenants, which lie side by side, than one
# tenant's rows, which do not. It assumes that a tenant's rows are evenly spread, but a quiet tenant has none among the
# newest. When pages cost nothing, the plan that reads the fewest rows wins: an index that begins with the tenant or the
# job.
_FEWEST_ROWS = {"seq_page_cost": "0", "random_page_cost": "0"}
# A connection that was idle for longer is pinged before its next use.
_REST_SECONDS = 0.5
_BOUNDS = "espalier_bounds"  # the name among an engine's execution options


class TenantSession(Session):
    """Sees one tenant's rows, and what others share with it; writes what the API may, in the name of its actor."""


class OperatorSession(Session):
    """Sees every tenant's settings and keys, and of jobs what views show; writes settings and keys."""


class AuditorSession(Session):
    """Sees every row; writes none."""


class OwnerSession(Session):
    """Sees what belongs to no tenant, and the audit log; writes the registry of base models."""


class KeySession(Session):
    """Sees one API key's row, and once `enter_tenant` has told whose, its tenant; writes when the key was used."""


class ServiceSession(Session):
    """Sees and writes what the role that logged in is granted: in a worker or the schedule, every tenant's jobs."""


# Who writes files, jobs and what becomes of jobs: a tenant its own, a service everybody's.
WorkWriter: TypeAlias = TenantSession | ServiceSession
SessionKind = TypeVar("SessionKind", bound=Session)


def connect(database_url: str, *, pool_size: int = 5, lock_timeout_seconds: float = 0) -> Engine:
    """Return an engine for a database's URL (core.database_urls). A dead server is noticed within seconds, not minutes.

    `lock_timeout_seconds` bounds each wait for another transaction, which then raises one of DATABASE_ERRORS; 0 waits
    for ever. Raises ValueError for an invalid URL.
    """
    address = read_url(database_url)
    engine = create_engine(
        "postgresql+psycopg://",
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=5,
        hide_parameters=True,  # parameters would appear in the texts of errors, which are logged
        pool_use_lifo=True,  # the connection used last is used first, so few connections are in use and pings are rare
        connect_args={
            **CONNECTION_ARGUMENTS,
            **address.parameters,
            **({"prepare_threshold": None} if address.is_pooled else {}),
        },
        execution_options={_BOUNDS: _bounds_of(lock_timeout_seconds)},
    )
    _ping_what_has_rested(engine)
    event.listen(engine, "handle_error", _leave_moved_server)
    event.listen(engine, "handle_error", _forget_values)
    event.listen(engine, "handle_error", _tell_damage, retval=True)
    return engine


def _bounds_of(lock_timeout_seconds: float) -> dict[str, str]:
    """Return a transaction's time limits. Each transaction sets them: a pooler would pass a session's to others."""
    return {
        "idle_in_transaction_session_timeout": str(_IDLE_TRANSACTION_MILLISECONDS),
        "lock_timeout": str(int(lock_timeout_seconds * 1000)),
    }


def state_of(error: BaseException) -> str:
    """Return the SQLSTATE of PostgreSQL's error, or an empty string."""
    return getattr(error.orig if isinstance(error, DBAPIError) else error, "sqlstate", None) or ""


def took_too_long(error: BaseException) -> bool:
    """Return whether one of DATABASE_ERRORS says that a statement met a time limit: the next try would meet it too."""
    return state_of(error) in _TOO_LONG_STATES


@contextmanager
def tenant_transaction(engine: Engine, tenant_id: uuid.UUID, *, actor: str = "") -> Iterator[TenantSession]:
    """Open a transaction that sees and writes only this tenant's rows. The audit log will name `actor`."""
    identity = {"app.tenant_id": str(tenant_id), "app.actor": actor}
    with _transaction(TenantSession, engine, identity | _FEWEST_ROWS) as session:
        yield session


@contextmanager
def operator_transaction(engine: Engine, *, actor: str) -> Iterator[OperatorSession]:
    """Open a transaction in the operator's role, which sees every tenant's settings, but no files and no jobs."""
    with _transaction(OperatorSession, engine, {"role": OPERATOR, "app.actor": actor}) as session:
        yield session


@contextmanager
def auditor_transaction(engine: Engine) -> Iterator[AuditorSession]:
    """Open a transaction in the auditor's role, which reads every tenant's rows and changes none."""
    with _transaction(AuditorSession, engine, {"role": AUDITOR}) as session:
        yield session


@contextmanager
def owner_transaction(engine: Engine, *, actor: str = "") -> Iterator[OwnerSession]:
    """Open a transaction in the owner's role, with which the engine logs in. Without `actor` the log names the role."""
    with _transaction(OwnerSession, engine, {"app.actor": actor}) as session:
        yield session


@contextmanager
def key_transaction(engine: Engine, key_id: str) -> Iterator[KeySession]:
    """Open a transaction that sees only one API key's row, because the key's tenant is not known yet."""
    with _transaction(KeySession, engine, {"app.key_id": key_id}) as session:
        yield session


def enter_tenant(session: KeySession, tenant_id: uuid.UUID) -> None:
    """Let a transaction that has found its key's tenant see this tenant's rows too.

    It does not become a TenantSession: it names no actor, so it may not change the tenant's rows.
    """
    session.info["identity"]["app.tenant_id"] = str(tenant_id)
    _set_locally(session.connection(), {"app.tenant_id": str(tenant_id)})


@contextmanager
def service_transaction(engine: Engine) -> Iterator[ServiceSession]:
    """Open a transaction without a tenant. It sees what its database role is granted."""
    with _transaction(ServiceSession, engine, {}) as session:
        yield session


@contextmanager
def _transaction(kind: type[SessionKind], engine: Engine, identity: dict[str, str]) -> Iterator[SessionKind]:
    with kind(engine, info={"identity": dict(identity)}, expire_on_commit=False) as session:
        yield session
        session.commit()
    if told := session.info.get("notifications"):
        _notify(engine, told)


def notify_after_commit(session: Session, channel: str, payload: str) -> None:
    """Send a notification once this transaction is committed. Its readers also query from time to time without one.

    PostgreSQL commits notifying transactions one at a time, including the flush. A transaction that only notifies has
    nothing to flush, so the commits of others still share theirs.
    """
    session.info.setdefault("notifications", []).append((channel, payload))


def _notify(engine: Engine, told: Sequence[tuple[str, str]]) -> None:
    with suppress(*DATABASE_ERRORS), engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        quote = Escaping(driver.pgconn).escape_literal
        calls = [b"pg_notify(%s, %s)" % (quote(channel.encode()), quote(payload.encode())) for channel, payload in told]
        driver.pgconn.exec_(b"select " + b", ".join(calls))


@event.listens_for(Session, "after_begin")
def _begin(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    """Send BEGIN and the identity together. If that fails, both are sent separately, which raises the usual error."""
    driver: Any = connection.connection.driver_connection
    if driver.pgconn.transaction_status != TransactionStatus.IDLE:  # a savepoint
        return
    bounds: dict[str, str] = connection.get_execution_options()[_BOUNDS]
    settings = bounds | session.info.get("identity", {})
    calls = [_set_config_call(driver, name, value) for name, value in settings.items()]
    result = driver.pgconn.exec_(b"begin; select " + b", ".join(calls))
    if result.status != ExecStatus.TUPLES_OK:
        driver.pgconn.exec_(b"rollback")
        _set_locally(connection, settings)


def _set_config_call(driver: Any, name: str, value: str) -> bytes:
    return b"set_config('%s', %s, true)" % (name.encode(), Escaping(driver.pgconn).escape_literal(value.encode()))


def _set_locally(connection: Connection, settings: Mapping[Any, str]) -> None:
    for name, value in settings.items():
        connection.execute(text("select set_config(:name, :value, true)"), {"name": name, "value": value})


def _leave_moved_server(context: ExceptionContext) -> None:
    """Discard all pooled connections when one of them leads to a server that no longer serves."""
    if state_of(context.original_exception) in _MOVED_STATES:
        context.is_disconnect = True


def _forget_values(context: ExceptionContext) -> None:
    """Remove from an error all that quotes a row or a value, because errors are logged. Names of the schema stay."""
    refused, wrapped = context.original_exception, context.sqlalchemy_exception
    if not isinstance(refused, psycopg.Error) or refused.diag.message_primary is None or wrapped is None:
        return
    is_about_a_value = (refused.sqlstate or "").startswith(_DATA_EXCEPTIONS)
    refused.args = ("a value was refused" if is_about_a_value else refused.diag.message_primary,)
    kind = type(refused)
    wrapped.args = (f"({kind.__module__}.{kind.__name__}) {refused}",)


def _tell_damage(context: ExceptionContext) -> DamagedRowError | None:
    """Return a DamagedRowError if PostgreSQL has met damaged data. It still serves, so the database is not away."""
    refused, wrapped = context.original_exception, context.sqlalchemy_exception
    if not isinstance(refused, psycopg.InternalError) or wrapped is None or context.is_disconnect:
        return None
    if not state_of(refused).startswith(_INTERNAL_ERRORS) or refused.diag.severity_nonlocalized != "ERROR":
        return None
    damaged = DamagedRowError(wrapped.statement, None, refused, hide_parameters=True)
    damaged.args = wrapped.args
    return damaged


def _ping_what_has_rested(engine: Engine) -> None:
    """Replace connections that died while idle. A ping before every use would cost each transaction a round trip."""

    @event.listens_for(engine, "checkin")
    def note_rest(_connection: Any, record: Any) -> None:
        record.info["rests_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def ping_rested(connection: Any, record: Any, _proxy: Any) -> None:
        if time.monotonic() - record.info.get("rests_since", time.monotonic()) < _REST_SECONDS:
            return
        if not _is_alive(connection):
            raise InvalidatePoolError


def _is_alive(driver: Any) -> bool:
    try:
        return bool(driver.pgconn.exec_(b"select 1").status == ExecStatus.TUPLES_OK)
    except DATABASE_ERRORS:
        return False
