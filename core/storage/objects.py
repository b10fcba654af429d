"""What the service needs of an object store, and what can go wrong.

An error is one of these:

    StorageError
    |- ObjectNotFoundError
    '- StorageUnavailableError     the server is away, slow or refuses; later may work
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol


class StorageError(Exception):
    """Something went wrong with an object."""


class ObjectNotFoundError(StorageError):
    """There is no object at that key."""


class StorageUnavailableError(StorageError):
    """The object store did not answer, or refused."""


@dataclass(frozen=True)
class StoredObject:
    size_bytes: int
    sha256: str


class ObjectStore(Protocol):
    """What the service needs of an object store. Keys are made by `core.domain.objects`."""

    def put_stream(self, object_key: str, chunks: Iterable[bytes], *, content_type: str) -> StoredObject:
        """Store a stream of unknown length in constant memory; nothing is stored when `chunks` raises."""

    def put_bytes(self, object_key: str, body: bytes, *, content_type: str) -> StoredObject:
        """Store a small object."""

    def get_stream(self, object_key: str, *, offset: int = 0) -> Generator[bytes]:
        """Return an object's bytes in chunks. Raises ObjectNotFoundError at the call, before the first chunk."""

    def stat(self, object_key: str) -> int | None:
        """Return the size in bytes, or None where there is no object."""

    def hash_object(self, object_key: str) -> StoredObject:
        """Read an object back and say what it is."""

    def delete(self, object_key: str) -> None:
        """Delete an object; deleting what is not there is no error."""

    def delete_prefix(self, prefix: str) -> int:
        """Delete every object behind a prefix that ends in a slash, and say how many there were."""

    def list_keys(self, prefix: str) -> Iterator[str]: ...

    def abort_uploads(self, prefix: str, *, min_age: timedelta) -> int:
        """Give up multipart uploads that nobody will complete, and say how many there were."""

    def renew_keys(self) -> None:
        """Ask for keys where the last have expired: signing then waits for nobody. Raises StorageUnavailableError."""

    def presign_get(self, object_key: str, *, expires: timedelta, filename: str) -> str:
        """Return a URL on the public endpoint that downloads the object under that name."""

    def presign_put(self, object_key: str, *, expires: timedelta) -> str:
        """Return a URL on the internal endpoint, for the trainer."""

    def presign_internal_get(self, object_key: str, *, expires: timedelta) -> str:
        """Return a URL on the internal endpoint, for the trainer."""
