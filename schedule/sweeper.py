"""Deletes objects that no row names, and settles the usage that lost workers never reported. Safe to do twice at once.

No transaction is open while the object store is asked.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterator

import structlog
from sqlalchemy import Engine

from core.db.session import service_transaction
from core.domain.objects import files_prefix, tenant_prefix
from core.services.garbage import (
    EndedJob,
    find_orphaned_files,
    find_unswept_jobs,
    list_tenant_ids,
    mark_swept,
    settle_usage,
)
from core.storage import ObjectStore

log = structlog.get_logger()
_SETTLE_AGE = dt.timedelta(minutes=10)
_BATCH = 500


def sweep(engine: Engine, store: ObjectStore, *, min_age: dt.timedelta) -> int:
    """Do all there is to do and return how many objects and uploads went. Raises StorageError and OperationalError."""
    num_deleted = sum(_sweep_job(engine, store, job) for job in _unswept_jobs(engine, min_age))
    with service_transaction(engine) as session:
        tenant_ids = list_tenant_ids(session)
    for tenant_id in tenant_ids:
        num_deleted += _sweep_files(engine, store, files_prefix(tenant_id), min_age)
        begun_before = dt.datetime.now(dt.UTC) - min_age
        num_deleted += store.abort_uploads(tenant_prefix(tenant_id), begun_before=begun_before)
    return num_deleted


def settle(engine: Engine) -> int:
    """Book what lost workers never will, and return for how many attempts."""
    with service_transaction(engine) as session:
        return settle_usage(session, min_age=_SETTLE_AGE)


def _unswept_jobs(engine: Engine, min_age: dt.timedelta) -> Iterator[EndedJob]:
    while True:
        with service_transaction(engine) as session:
            jobs = find_unswept_jobs(session, min_age=min_age)
        if not jobs:
            return
        yield from jobs  # each is marked before the next batch is asked for


def _sweep_job(engine: Engine, store: ObjectStore, job: EndedJob) -> int:
    garbage = [key for key in store.list_keys(job.prefix) if job.is_garbage(key)]
    for object_key in garbage:
        store.delete(object_key)
    with service_transaction(engine) as session:
        mark_swept(session, job.id)
    log.info("job.swept", job_id=str(job.id), num_objects=len(garbage))
    return len(garbage)


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
