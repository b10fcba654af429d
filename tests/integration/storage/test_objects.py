"""The guarantees of an ObjectStore for its objects, against a real S3 server."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from minio import Minio

from core.domain.objects import attempt_prefix, file_key, tenant_prefix
from core.settings import StorageConfig
from core.storage import (
    PART_BYTES,
    ObjectNotFoundError,
    S3ObjectStore,
    StorageUnavailableError,
    host_time,
)
from tests.integration.storage.objects import MINUTE, TYPE, describe


class _UploadBrokenError(Exception):
    pass


def _pattern(num_bytes: int) -> bytes:
    """Return bytes in which no part equals another, so that swapped or repeated parts show."""
    return b"".join(number.to_bytes(8, "big") for number in range(num_bytes // 8 + 1))[:num_bytes]


@pytest.mark.parametrize(
    "num_bytes", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 2 * PART_BYTES + 7]
)
def test_a_stream_of_any_length_comes_back_byte_for_byte(store: S3ObjectStore, prefix: str, num_bytes: int) -> None:
    body = _pattern(num_bytes)
    chunks = (body[start : start + 100_003] for start in range(0, num_bytes, 100_003))

    stored = store.put_stream(prefix + "object", chunks, content_type=TYPE)

    assert stored == describe(body)
    assert b"".join(store.get_stream(prefix + "object")) == body
    assert store.hash_object(prefix + "object") == stored
    assert store.stat(prefix + "object") == num_bytes


def test_a_stream_is_read_as_it_is_stored_and_not_before(store: S3ObjectStore, prefix: str) -> None:
    num_uploads_seen = []

    def chunks() -> Iterator[bytes]:
        for _ in range(4):
            yield bytes(PART_BYTES)
            num_uploads_seen.append(len(_open_uploads(store, prefix)))

    store.put_stream(prefix + "object", chunks(), content_type=TYPE)

    assert num_uploads_seen == [0, 1, 1, 1]  # the upload is open while chunks are still being asked for
    assert _open_uploads(store, prefix) == []


@pytest.mark.parametrize("num_parts", [0, 3])
def test_a_stream_that_raises_leaves_no_object_no_open_upload_and_no_thread(
    store: S3ObjectStore, prefix: str, num_parts: int
) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(num_parts):
            yield bytes(PART_BYTES)
        yield b"the last"
        raise _UploadBrokenError

    num_threads = threading.active_count()
    with pytest.raises(_UploadBrokenError):
        store.put_stream(prefix + "object", chunks(), content_type=TYPE)

    assert store.stat(prefix + "object") is None
    assert _open_uploads(store, prefix) == []
    assert threading.active_count() == num_threads


def test_the_content_type_is_kept(store: S3ObjectStore, raw_client: Minio, config: StorageConfig, prefix: str) -> None:
    store.put_bytes(prefix + "object", b"{}", content_type="application/json")
    assert raw_client.stat_object(config.bucket, prefix + "object").content_type == "application/json"


def test_a_stream_can_be_read_from_an_offset(store: S3ObjectStore, prefix: str) -> None:
    store.put_bytes(prefix + "object", b"0123456789", content_type=TYPE)
    assert b"".join(store.get_stream(prefix + "object", offset=7)) == b"789"


def test_a_missing_object_is_known_before_the_first_chunk(store: S3ObjectStore, prefix: str) -> None:
    with pytest.raises(ObjectNotFoundError):
        store.get_stream(prefix + "nothing")
    with pytest.raises(ObjectNotFoundError):
        store.hash_object(prefix + "nothing")
    assert store.stat(prefix + "nothing") is None
    store.delete(prefix + "nothing")  # no error


def test_deleting_a_prefix_leaves_its_neighbours(store: S3ObjectStore, prefix: str) -> None:
    for name in ("a/1", "a/2", "a/b/3", "ab/4", "c"):
        store.put_bytes(prefix + name, b"x", content_type=TYPE)

    assert store.delete_prefix(prefix + "a/") == 3
    assert sorted(store.list_keys(prefix)) == [prefix + "ab/4", prefix + "c"]
    assert store.delete_prefix(prefix + "a/") == 0


@pytest.mark.parametrize("open_prefix", ["", "tenants/1"])
def test_a_prefix_that_reaches_into_its_neighbours_is_refused(store: S3ObjectStore, open_prefix: str) -> None:
    with pytest.raises(ValueError, match="slash"):
        store.delete_prefix(open_prefix)


def test_a_prefix_of_more_than_a_page_of_objects_is_listed_and_deleted_whole(store: S3ObjectStore, prefix: str) -> None:
    names = [f"{prefix}{index:04}" for index in range(1003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put_bytes(name, b"", content_type=TYPE), names))
    assert list(store.list_keys(prefix)) == names
    assert store.delete_prefix(prefix) == len(names)
    assert list(store.list_keys(prefix)) == []


def test_a_server_that_is_away_is_our_own_error_at_once(config: StorageConfig) -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        store = S3ObjectStore(replace(config, endpoint=f"127.0.0.1:{taken.getsockname()[1]}"))
        with pytest.raises(StorageUnavailableError):
            store.stat("tests/x")
        with pytest.raises(StorageUnavailableError):
            store.get_stream("tests/x")


def test_a_download_that_is_cut_short_raises(config: StorageConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\nshort"
        server = threading.Thread(target=_answer_once, args=(listener, answer))
        server.start()
        store = S3ObjectStore(replace(config, endpoint=f"127.0.0.1:{listener.getsockname()[1]}"))
        with pytest.raises(StorageUnavailableError):
            b"".join(store.get_stream("tests/x"))
        server.join()


def test_the_bucket_is_made_once_by_whoever_comes_first(config: StorageConfig) -> None:
    store = S3ObjectStore(replace(config, bucket=f"made-{uuid.uuid4()}"))
    racers = [threading.Thread(target=store.ensure_bucket) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()  # a failed one would be reported by pytest as an unhandled thread exception
    assert store.put_bytes("tests/x", b"x", content_type=TYPE) == describe(b"x")


def test_object_keys_stand_behind_the_tenant_and_the_fence() -> None:
    tenant_id, file_id, job_id = (uuid.UUID(int=number) for number in (1, 2, 3))
    assert file_key(tenant_id, file_id) == f"tenants/{tenant_id}/files/{file_id}/content.jsonl"
    assert attempt_prefix(tenant_id, job_id, 7) == f"tenants/{tenant_id}/jobs/{job_id}/7/"
    assert file_key(tenant_id, file_id).startswith(tenant_prefix(tenant_id))
    assert attempt_prefix(tenant_id, job_id, 7).startswith(tenant_prefix(tenant_id))


def _open_uploads(store: S3ObjectStore, prefix: str) -> list[str]:
    uploads = store._client._list_multipart_uploads(store._bucket, prefix=prefix)
    return [upload.object_name for upload in uploads.uploads]


def _answer_once(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(answer)


def test_more_leftovers_of_uploads_than_a_page_holds_are_given_up(
    store: S3ObjectStore, config: StorageConfig, raw_client: Minio, prefix: str
) -> None:
    num_leftovers = 1100
    for number in range(num_leftovers):
        raw_client._create_multipart_upload(config.bucket, f"{prefix}{number:04}", {})
    later = S3ObjectStore(config, now=lambda: host_time() + MINUTE)
    assert later.abort_uploads(prefix, min_age=timedelta(0)) == num_leftovers
    assert store.abort_uploads(prefix, min_age=-MINUTE) == 0


def test_more_objects_than_a_page_holds_are_deleted(store: S3ObjectStore, prefix: str) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: store.put_bytes(f"{prefix}{n:04}", b"", content_type=TYPE), range(1100)))
    assert store.delete_prefix(prefix) == 1100
    assert list(store.list_keys(prefix)) == []
