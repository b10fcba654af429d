"""Deletes objects that no row names, and books usage that lost workers never reported. Safe to run twice at once.

No transaction is open during requests to the object store.
"""

from __future__ import annotations

import datetime as dt
import itertools
import uuid
from collections.abc import Callable, Iterator
from functools import partial

import structlog
from sqlalchemy import Engine

from core.db.session import service_transaction
from core.domain.duties import Duty
from core.domain.objects import files_prefix, tenant_prefix
from core.services.garbage import (
    EndedJob,
    find_orphaned_files,
    find_unswept_jobs,
    list_tenant_ids,
    mark_swept,
    settle_usage,
)
from core.services.set_asides import ROW_ERRORS, set_aside
from core.storage import ObjectStore, StorageError
from schedule.patience import Patience

log = structlog.get_logger()
_SETTLE_AGE = dt.timedelta(minutes=10)
_BATCH = 500


def sweep(
    engine: Engine, store: ObjectStore, *, min_age: dt.timedelta, show_life: Callable[[], None] = lambda: None
) -> int:
    """Sweep everything and return how many objects and uploads were deleted. `show_life` is called before each step.

    Raises DATABASE_ERRORS, and StorageError when the object store seems to be away.
    """
    num_deleted, patience = 0, Patience()
    for job in _unswept_jobs(engine, min_age):
        show_life()
        work = partial(_sweep_job, engine, store, job)
        num_deleted += _try(engine, work, patience, row_id=job.id, tenant_id=job.tenant_id)
    with service_transaction(engine) as session:
        tenant_ids = list_tenant_ids(session)
    for tenant_id in tenant_ids:
        show_life()
        work = partial(_sweep_tenant, engine, store, tenant_id, min_age)
        num_deleted += _try(engine, work, patience, row_id=tenant_id, tenant_id=tenant_id)
    return num_deleted


def _try(
    engine: Engine, work: Callable[[], int], patience: Patience, *, row_id: uuid.UUID, tenant_id: uuid.UUID
) -> int:
    """Sweep one job or one tenant. If that fails it is set aside and delays no other."""
    try:
        num_deleted = work()
    except (StorageError, *ROW_ERRORS) as error:
        with service_transaction(engine) as session:
            set_aside(session, Duty.SWEEP, row_id=row_id, tenant_id=tenant_id, error=error)
        patience.heed(error)
        return 0
    patience.heed(None)
    return num_deleted


def settle(engine: Engine) -> int:
    """Book the usage that lost workers did not, some in each transaction. Return for how many attempts."""
    num_settled = 0
    while True:
        with service_transaction(engine) as session:
            num_booked = settle_usage(session, min_age=_SETTLE_AGE)
        if not num_booked:
            return num_settled
        num_settled += num_booked


def _unswept_jobs(engine: Engine, min_age: dt.timedelta) -> Iterator[EndedJob]:
    while True:
        with service_transaction(engine) as session:
            jobs = find_unswept_jobs(session, min_age=min_age)
        if not jobs:
            return
        yield from jobs  # each is marked or set aside before the next batch is read


def _sweep_job(engine: Engine, store: ObjectStore, job: EndedJob) -> int:
    garbage = [key for key in store.list_keys(job.prefix) if job.is_garbage(key)]
    for object_key in garbage:
        store.delete(object_key)
    with service_transaction(engine) as session:
        mark_swept(session, job.id)
    log.info("job.swept", job_id=str(job.id), num_objects=len(garbage))
    return len(garbage)


def _sweep_tenant(engine: Engine, store: ObjectStore, tenant_id: uuid.UUID, min_age: dt.timedelta) -> int:
    num_deleted = _sweep_files(engine, store, files_prefix(tenant_id), min_age)
    return num_deleted + store.abort_uploads(tenant_prefix(tenant_id), min_age=min_age)


def _sweep_files(engine: Engine, store: ObjectStore, prefix: str, min_age: dt.timedelta) -> int:
    num_deleted = 0
    keys = store.list_keys(prefix)
    while batch := tuple(itertools.islice(keys, _BATCH)):
        with service_transaction(engine) as session:
            orphans = find_orphaned_files(session, batch, min_age=min_age)
        for object_key in orphans:
            store.delete(object_key)
            log.info("file.orphan_deleted", object_key=object_key)
        num_deleted += len(orphans)
    return num_deleted
