"""The one ObjectStore, on an S3-compatible server.

Presigned URLs are signed for the endpoint that clients see, which may differ from the one that this process uses.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, BinaryIO, cast
from urllib.parse import quote
from xml.etree.ElementTree import ParseError

import urllib3
from minio.deleteobjects import DeleteObject
from minio.error import MinioException, S3Error
from urllib3 import BaseHTTPResponse

from core.domain.objects import OBJECTS_PREFIX
from core.settings import StorageConfig
from core.storage.clients import StoreCredentials, connect_client, host_time
from core.storage.objects import ObjectNotFoundError, StorageError, StorageUnavailableError, StoredObject

PART_BYTES = 8 * 2**20
CHUNK_BYTES = 256 * 2**10
MAX_URL_LIFETIME = timedelta(minutes=15)
_NOT_FOUND_CODES = {"NoSuchKey", "NoSuchObject", "NotFound"}
_BUCKET_EXISTS_CODES = {"BucketAlreadyExists", "BucketAlreadyOwnedByYou"}


class S3ObjectStore:
    """An ObjectStore on an S3-compatible server. `now` is the time that everything is signed with."""

    def __init__(self, config: StorageConfig, *, now: Callable[[], dt.datetime] = host_time) -> None:
        self._config, self._now = config, now
        self._bucket = config.bucket
        self._credentials = StoreCredentials(config)
        self._client = self._public_client = connect_client(config, now=now, credentials=self._credentials)
        if config.public_endpoint is not None:
            public = replace(config, endpoint=config.public_endpoint, secure=config.is_public_secure)
            self._public_client = connect_client(public, now=now, credentials=self._credentials)

    def ensure_bucket(self) -> bool:
        """Make the bucket if it is not there and say whether; another process may be doing the same."""
        with _translated_errors():
            if self._client.bucket_exists(self._bucket):
                return False
            try:
                self._client.make_bucket(self._bucket)
            except S3Error as error:
                if error.code not in _BUCKET_EXISTS_CODES:
                    raise
                return False
        return True

    def check(self) -> None:
        """Raise StorageError where the bucket is not there, or does not let these keys in. It costs one request."""
        with _translated_errors():
            is_there = self._client.bucket_exists(self._bucket)
        if not is_there:
            raise StorageError(f"There is no bucket {self._bucket!r}.")

    def put_stream(self, object_key: str, chunks: Iterable[bytes], *, content_type: str) -> StoredObject:
        reader = _HashingReader(iter(chunks))
        with _translated_errors():
            self._client.put_object(
                self._bucket,
                object_key,
                cast("BinaryIO", reader),
                length=-1,
                part_size=PART_BYTES,
                num_parallel_uploads=1,  # with more, minio leaves its threads behind when `chunks` raises
                content_type=content_type,
            )
        return reader.stored

    def put_bytes(self, object_key: str, body: bytes, *, content_type: str) -> StoredObject:
        return self.put_stream(object_key, [body], content_type=content_type)

    def get_stream(self, object_key: str, *, offset: int = 0) -> Generator[bytes]:
        # Opened here and not in the generator: a caller learns of a missing object before it has answered anybody.
        with _translated_errors():
            response = self._client.get_object(self._bucket, object_key, offset=offset)
        return _iterate_response(response)

    def stat(self, object_key: str) -> int | None:
        try:
            with _translated_errors():
                size_bytes = self._client.stat_object(self._bucket, object_key).size
        except ObjectNotFoundError:
            return None
        assert size_bytes is not None
        return int(size_bytes)

    def hash_object(self, object_key: str) -> StoredObject:
        digest, size_bytes = hashlib.sha256(), 0
        for chunk in self.get_stream(object_key):
            digest.update(chunk)
            size_bytes += len(chunk)
        return StoredObject(size_bytes=size_bytes, sha256=digest.hexdigest())

    def delete(self, object_key: str) -> None:
        with _translated_errors():
            self._client.remove_object(self._bucket, object_key)

    def delete_prefix(self, prefix: str) -> int:
        if not prefix.endswith("/"):
            raise ValueError(f"The prefix {prefix!r} must end in a slash, or it would reach into its neighbours.")
        keys = list(self.list_keys(prefix))
        with _translated_errors():
            refusals = list(self._client.remove_objects(self._bucket, [DeleteObject(key) for key in keys]))
        if refusals:
            raise StorageUnavailableError(f"{len(refusals)} objects could not be deleted: {refusals[0].message}")
        return len(keys)

    def list_keys(self, prefix: str) -> Iterator[str]:
        with _translated_errors():
            for entry in self._client.list_objects(self._bucket, prefix=prefix, recursive=True):
                yield str(entry.object_name)

    def abort_uploads(self, prefix: str, *, min_age: timedelta) -> int:
        begun_before = self._now() - min_age
        with _translated_errors():
            found = list(self._list_uploads(prefix))
            stale = [each for each in found if each.initiated_time and each.initiated_time < begun_before]
            for each in stale:
                self._client._abort_multipart_upload(self._bucket, each.object_name, each.upload_id)  # noqa: SLF001
        return len(stale)

    def _list_uploads(self, prefix: str) -> Iterator[Any]:
        """Return the multipart uploads that are open, which a server lists by the thousand."""
        key = upload_id = None
        while True:
            # minio has this request, and names it as its own.
            found = self._client._list_multipart_uploads(  # noqa: SLF001
                self._bucket, prefix=prefix, key_marker=key, upload_id_marker=upload_id
            )
            yield from found.uploads
            # Servers order by key or by upload and mark the next page accordingly. minio 7.2 misnames the second mark.
            key, upload_id = found.next_key_marker, vars(found).get("self._next_upload_id_marker")
            if not found.is_truncated or not (key or upload_id):
                return

    def renew_keys(self) -> None:
        self._credentials.retrieve()

    def presign_get(self, object_key: str, *, expires: timedelta, filename: str) -> str:
        _check_url(object_key, expires)
        headers: dict[str, Any] = {"response-content-disposition": _attachment(filename)}
        with _translated_errors():
            return str(
                self._public_client.get_presigned_url(
                    "GET",
                    self._bucket,
                    object_key,
                    expires=expires,
                    response_headers=headers,
                    request_date=self._now(),
                )
            )

    def presign_put(self, object_key: str, *, expires: timedelta) -> str:
        _check_url(object_key, expires)
        with _translated_errors():
            return self._presign("PUT", object_key, expires)

    def presign_internal_get(self, object_key: str, *, expires: timedelta) -> str:
        _check_url(object_key, expires)
        with _translated_errors():
            return self._presign("GET", object_key, expires)

    def _presign(self, method: str, object_key: str, expires: timedelta) -> str:
        client = self._client
        return str(
            client.get_presigned_url(method, self._bucket, object_key, expires=expires, request_date=self._now())
        )


def _check_url(object_key: str, expires: timedelta) -> None:
    """A URL is a secret that whoever holds it may use: it is for one object of one tenant, and soon worth nothing."""
    if not object_key.startswith(OBJECTS_PREFIX) or ".." in object_key.split("/"):
        raise ValueError("Only keys that core.domain.objects has made are signed.")
    if not timedelta() < expires <= MAX_URL_LIFETIME:
        raise ValueError(f"A URL lives for {MAX_URL_LIFETIME} at most.")


def _iterate_response(response: BaseHTTPResponse) -> Generator[bytes]:
    try:
        with _translated_errors():
            yield from response.stream(CHUNK_BYTES)
    finally:
        response.close()
        response.release_conn()


def _attachment(filename: str) -> str:
    """Name a download as RFC 6266 does: plain ASCII for old clients, percent-encoded UTF-8 for the others."""
    plain = "".join(letter if letter.isascii() and letter.isprintable() else "_" for letter in filename)
    plain = plain.translate({ord('"'): "_", ord("\\"): "_"})
    encoded = quote(filename, safe="", errors="replace")
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}"


class _HashingReader:
    """Reads an iterator of chunks like a file, and knows the size and SHA-256 of what has passed."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._pending = b""
        self._size_bytes = 0
        self._hash = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer only at the end. Whole parts at once: minio joins smaller pieces one by one."""
        pieces, num_bytes = [self._pending], len(self._pending)
        while num_bytes < size and (chunk := next(self._chunks, None)) is not None:
            pieces.append(chunk)
            num_bytes += len(chunk)
        joined = b"".join(pieces)
        part, self._pending = joined[:size], joined[size:]
        self._size_bytes += len(part)
        self._hash.update(part)
        return part

    @property
    def stored(self) -> StoredObject:
        return StoredObject(size_bytes=self._size_bytes, sha256=self._hash.hexdigest())


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except S3Error as error:
        if error.code in _NOT_FOUND_CODES:
            raise ObjectNotFoundError(f"There is no object {error.object_name!r}.") from error
        raise StorageUnavailableError(f"The object store refused: {error.code}.") from error
    # A body that is no XML was cut or changed on its way.
    except (MinioException, urllib3.exceptions.HTTPError, ParseError) as error:
        raise StorageUnavailableError(f"The object store did not answer: {type(error).__name__}.") from error
