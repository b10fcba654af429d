"""Moves files between the scratch directory and the object store, through presigned URLs only.

A download counts only if its bytes hash to what the row says; a transfer is tried again on transport and server errors,
never on a refusal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import httpx
import stamina

from core.crashpoints import CrashPoint, reach
from worker.messages import RemoteFile, StoredFile
from worker.trainer.failures import TransferError

CHUNK_BYTES = 2**20
_TIMEOUT = httpx.Timeout(15.0, connect=5.0)
_ATTEMPTS = 5


class IntegrityError(TransferError):
    """The bytes that came are not the bytes that were stored."""

    code = "integrity"


class _PassingError(TransferError):
    """A fault that another try may not meet."""


def download(file: RemoteFile, destination: Path, *, on_progress: Callable[[], None]) -> None:
    """Fetch a file and check its size and SHA-256. Raises TransferError, or IntegrityError after the last try."""
    for attempt in stamina.retry_context(on=_is_passing, attempts=_ATTEMPTS):
        with attempt, _translated(), httpx.stream("GET", file.url, timeout=_TIMEOUT, trust_env=False) as response:
            response.raise_for_status()
            digest = hashlib.sha256()
            with destination.open("wb") as out:
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                    on_progress()
            if digest.hexdigest() != file.sha256:
                raise IntegrityError("A dataset's bytes are not the ones that were uploaded.")


def upload(url: str, path: Path, *, name: str, on_progress: Callable[[], None]) -> StoredFile:
    """Store a file under its URL and say what it is. Raises TransferError."""
    size_bytes = path.stat().st_size
    for attempt in stamina.retry_context(on=_is_passing, attempts=_ATTEMPTS):
        with attempt, _translated():
            digest = hashlib.sha256()
            response = httpx.put(
                url,
                content=_read_chunks(path, digest.update, on_progress),
                headers={"content-length": str(size_bytes)},
                timeout=_TIMEOUT,
                trust_env=False,
            )
            response.raise_for_status()
    return StoredFile(name=name, size_bytes=size_bytes, sha256=digest.hexdigest())


def _read_chunks(path: Path, on_chunk: Callable[[bytes], None], on_progress: Callable[[], None]) -> Iterator[bytes]:
    with path.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            reach(CrashPoint.UPLOAD)
            on_chunk(chunk)
            on_progress()
            yield chunk


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        kind = TransferError if status < HTTPStatus.INTERNAL_SERVER_ERROR else _PassingError
        raise kind(f"The object store answered {status}.") from None  # the URL in the cause is a bearer secret
    except httpx.TransportError as error:
        raise _PassingError(f"The object store did not answer: {type(error).__name__}.") from None


def _is_passing(error: Exception) -> bool:
    return isinstance(error, _PassingError | IntegrityError)
