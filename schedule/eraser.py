"""Erases what was deleted, in small transactions. Safe to run twice at once.

No transaction is open during requests to the object store.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Callable

import structlog
from sqlalchemy import Engine

from core.db.session import ServiceSession, service_transaction
from core.domain.objects import tenant_prefix
from core.services.erasure import (
    BEGINNING,
    Place,
    erase_some_jobs,
    erase_some_of_tenant,
    has_rows,
    list_deleted_tenants,
    mark_erased,
)
from core.storage import ObjectStore, StorageError
from schedule.metrics import ROWS_DELETED
from schedule.patience import Patience

log = structlog.get_logger()
_NOW = dt.timedelta(0)


def erase(
    engine: Engine, store: ObjectStore, *, min_age: dt.timedelta, may_go_on: Callable[[ServiceSession], bool]
) -> None:
    """Erase what is due. `may_go_on` is asked before each transaction. `min_age` is after how long nothing is late.

    Raises OperationalError, and StorageError when the object store seems to be away.
    """
    with service_transaction(engine) as session:
        tenant_ids = list_deleted_tenants(session)
    for tenant_id in tenant_ids:
        _erase_rows_of_tenant(engine, tenant_id, may_go_on)
    _erase_jobs(engine, may_go_on)
    patience = Patience()
    for tenant_id in tenant_ids:
        if _is_allowed(engine, may_go_on):
            patience.heed(_finish_tenant(engine, store, tenant_id, min_age))


def _erase_rows_of_tenant(engine: Engine, tenant_id: uuid.UUID, may_go_on: Callable[[ServiceSession], bool]) -> None:
    erased: Counter[str] = Counter()
    while _is_allowed(engine, may_go_on):
        with service_transaction(engine) as session:
            num_rows = erase_some_of_tenant(session, tenant_id)
        if not num_rows:
            break
        erased += num_rows
    if erased:
        log.info("tenant.rows_erased", tenant_id=str(tenant_id), **erased)


def _erase_jobs(engine: Engine, may_go_on: Callable[[ServiceSession], bool]) -> None:
    place: Place | None = BEGINNING
    erased: Counter[str] = Counter()
    while place is not None and _is_allowed(engine, may_go_on):
        with service_transaction(engine) as session:
            num_rows, place = erase_some_jobs(session, after=place)
        for table, num in num_rows.items():
            ROWS_DELETED.labels(table).inc(num)
        erased += num_rows
    if erased:
        log.info("jobs.erased", **erased)


def _finish_tenant(
    engine: Engine, store: ObjectStore, tenant_id: uuid.UUID, min_age: dt.timedelta
) -> StorageError | None:
    """Delete whatever object is left of a tenant that has no rows, and say so of the tenant. Return what failed."""
    with service_transaction(engine) as session:
        if has_rows(session, tenant_id):
            return None
    prefix = tenant_prefix(tenant_id)
    try:
        num_objects = store.delete_prefix(prefix) + store.abort_uploads(prefix, min_age=_NOW)
    except StorageError as error:
        log.warning("tenant.objects_not_erased", tenant_id=str(tenant_id), error=str(error))
        return error
    with service_transaction(engine) as session:
        is_erased = mark_erased(session, tenant_id, min_age=min_age)
    if num_objects or is_erased:
        log.info("tenant.objects_erased", tenant_id=str(tenant_id), num_objects=num_objects, is_last=is_erased)
    return None


def _is_allowed(engine: Engine, may_go_on: Callable[[ServiceSession], bool]) -> bool:
    with service_transaction(engine) as session:
        return may_go_on(session)
