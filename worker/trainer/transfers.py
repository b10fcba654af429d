"""Moves files between the scratch directory and the object store, through presigned URLs only.

A download counts only if its bytes hash to what the row says.

| what the store does | the transfer |
|---|---|
| it does not answer, or answers 5xx | is tried again while patience lasts, with growing pauses |
| it sends other bytes than were stored | is tried again, twice |
| it refuses the URL: 403, or 400 because of the signature | ends with UrlRefusedError: another URL may do |
| it has no such object: 404 | ends with ObjectMissingError |
| it refuses otherwise: another 4xx | ends with TransferError |
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import stamina

from core.crashpoints import CrashPoint, reach
from core.domain.values import StoredFile
from core.tls import trusted_certificates
from worker.messages import STORAGE_AWAY, RemoteFile
from worker.trainer.failures import TransferError, UrlRefusedError

CHUNK_BYTES = 2**20
CA_BUNDLE = "ESPALIER_S3_CA_BUNDLE"
_TIMEOUT = httpx.Timeout(15.0, connect=5.0)
_LONGEST_PAUSE_SECONDS = 5.0
_MAX_MISMATCHES = 3
# AWS answers 400 to a signature whose token has expired, and 403 to all other faults of a URL.
_URL_FAULTS = re.compile(rb"<Code>(ExpiredToken|InvalidToken|RequestTimeTooSkewed)</Code>")


class IntegrityError(TransferError):
    """The received bytes are not the stored bytes."""

    code = "integrity"


class ObjectMissingError(TransferError):
    """There is no such object."""


class _PassingError(TransferError):
    """A fault that may not occur at another try."""

    code = STORAGE_AWAY


@dataclass(frozen=True)
class Patience:
    """How long a transfer is tried. `check` is called before every try and chunk, and raises to end it."""

    seconds: float
    check: Callable[[], None]


def download(file: RemoteFile, destination: Path, patience: Patience) -> None:
    """Fetch a file and check its SHA-256. Raises TransferError, or IntegrityError after the last try."""
    for attempt in _tries(patience):
        with attempt, _translated(), _open("GET", file.url) as response:
            digest = hashlib.sha256()
            with destination.open("wb") as out:
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    patience.check()
                    digest.update(chunk)
                    out.write(chunk)
            if digest.hexdigest() != file.sha256:
                raise IntegrityError("Its bytes are not the ones that were stored.")


def upload(url: str, path: Path, patience: Patience) -> StoredFile:
    """Store a file under its URL and return its description. Raises TransferError."""
    size_bytes = path.stat().st_size
    for attempt in _tries(patience):
        with attempt, _translated():
            digest = hashlib.sha256()
            content = _read_chunks(path, digest.update, check=patience.check)
            with _open("PUT", url, content=content, headers={"content-length": str(size_bytes)}) as response:
                response.read()
    return StoredFile(name=path.name, size_bytes=size_bytes, sha256=digest.hexdigest())


@cache
def trust() -> ssl.SSLContext:
    """Read the trusted authorities once for the process, before the trainer gives up the right to read them."""
    return trusted_certificates(os.environ.get(CA_BUNDLE))


@contextmanager
def _open(method: str, url: str, **request: Any) -> Iterator[httpx.Response]:
    """Yield a successful response. Raises httpx.HTTPStatusError for another, with its body, which says the reason."""
    with httpx.stream(method, url, timeout=_TIMEOUT, trust_env=False, verify=trust(), **request) as response:
        if not response.is_success:
            response.read()  # the body cannot be read after this block
            response.raise_for_status()
        yield response


def _tries(patience: Patience) -> Iterator[AbstractContextManager[Any]]:
    """Try until patience ends, with growing pauses and jitter. Wrong bytes are tried a few times only."""
    mismatches = itertools.count(1)

    def is_passing(error: Exception) -> bool:
        if isinstance(error, IntegrityError):
            return next(mismatches) < _MAX_MISMATCHES
        return isinstance(error, _PassingError)

    for attempt in stamina.retry_context(
        on=is_passing, attempts=None, timeout=patience.seconds, wait_max=_LONGEST_PAUSE_SECONDS
    ):
        patience.check()
        yield attempt


def _read_chunks(path: Path, on_chunk: Callable[[bytes], None], *, check: Callable[[], None]) -> Iterator[bytes]:
    with path.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            check()
            reach(CrashPoint.UPLOAD)
            on_chunk(chunk)
            yield chunk


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        # None, because the URL in the cause is a secret
        raise _kind_of(error.response)(f"The object store answered {error.response.status_code}.") from None
    except (httpx.RequestError, httpx.StreamError) as error:  # a body that cannot be decoded is no transport error
        raise _PassingError(f"The object store did not answer: {type(error).__name__}.") from None


def _kind_of(response: httpx.Response) -> type[TransferError]:
    status = response.status_code
    if status == HTTPStatus.NOT_FOUND:
        return ObjectMissingError
    if status == HTTPStatus.FORBIDDEN or (status == HTTPStatus.BAD_REQUEST and _URL_FAULTS.search(response.content)):
        return UrlRefusedError
    return TransferError if status < HTTPStatus.INTERNAL_SERVER_ERROR else _PassingError
