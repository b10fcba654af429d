"""Objects in the store, each of which holds its own key."""

from __future__ import annotations

from core.domain.values import StoredFile
from core.storage import S3ObjectStore
from tests.factories.tenants import Tenant


def put(store: S3ObjectStore, key: str) -> tuple[StoredFile, ...]:
    stored = store.put_bytes(key, key.encode(), content_type="text/plain")
    return (StoredFile(name=key.rpartition("/")[2], size_bytes=stored.size_bytes, sha256=stored.sha256),)


def keys(store: S3ObjectStore, tenant: Tenant) -> set[str]:
    """Return the last part of the keys of all that a tenant has."""
    return {key.rpartition("/")[2] for key in store.list_keys(f"tenants/{tenant.id}/")}
