"""Objects: one protocol, one implementation on the minio client for MinIO or any S3-compatible server."""

from core.storage.clients import connect_client, host_time
from core.storage.objects import (
    ObjectNotFoundError,
    ObjectStore,
    StorageError,
    StorageUnavailableError,
    StoredObject,
)
from core.storage.s3 import PART_BYTES, S3ObjectStore

__all__ = [
    "PART_BYTES",
    "ObjectNotFoundError",
    "ObjectStore",
    "S3ObjectStore",
    "StorageError",
    "StorageUnavailableError",
    "StoredObject",
    "connect_client",
    "host_time",
]
