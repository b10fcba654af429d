"""What a process needs to be ready: a database that takes writes, and the object store (core.telemetry.readiness)."""

from __future__ import annotations

from functools import partial

from sqlalchemy import Engine

from core.db.readiness import check_database
from core.domain.errors import UnavailableError
from core.storage import S3ObjectStore, StorageError
from core.telemetry.readiness import Need, Readiness


def find_readiness(engine: Engine, store: S3ObjectStore, *, is_store_vital: bool) -> Readiness:
    """Return the needs of a process. A process for which the store is not vital does most of its work without it."""
    return Readiness(
        Need("database", "database_unavailable", partial(check_database, engine)),
        Need("object store", "storage_unavailable", partial(_check_store, store), is_vital=is_store_vital),
    )


def _check_store(store: S3ObjectStore) -> None:
    try:
        store.check()
    except StorageError as error:
        raise UnavailableError(f"The object store cannot be used: {error}", code="storage_unavailable") from error
