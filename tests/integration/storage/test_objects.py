"""What an ObjectStore promises, against a real S3 server."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import httpx
import pytest
from minio import Minio

from core.domain.objects import attempt_prefix, file_key, tenant_prefix
from core.settings import StorageConfig
from core.storage import (
    PART_BYTES,
    ObjectNotFoundError,
    S3ObjectStore,
    StorageUnavailableError,
    StoredObject,
    host_time,
)
from tests.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from local.servers import ServerAddresses

MINUTE = timedelta(minutes=1)
TYPE = "application/octet-stream"


@pytest.fixture(scope="session")
def config(servers: ServerAddresses) -> StorageConfig:
    return servers.storage


@pytest.fixture(scope="session")
def store(config: StorageConfig) -> S3ObjectStore:
    made = S3ObjectStore(config)
    made.ensure_bucket()
    return made


@pytest.fixture
def prefix() -> str:
    return f"tenants/{uuid.uuid4()}/"


@pytest.fixture
def raw_client(config: StorageConfig) -> Minio:
    """A second, independent view of the server."""
    return Minio(config.endpoint, access_key=config.access_key, secret_key=config.secret_key, secure=False)


class _UploadBrokenError(Exception):
    pass


def _describe(body: bytes) -> StoredObject:
    return StoredObject(size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())


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

    assert stored == _describe(body)
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


@pytest.mark.parametrize(
    "filename", ["adapter.tar", 'a"; x="b.txt', "a\r\nX-Evil: 1.txt", "données ☂.jsonl", "a\\b/c%20"]
)
def test_a_presigned_download_is_an_attachment_of_that_name(store: S3ObjectStore, prefix: str, filename: str) -> None:
    store.put_bytes(prefix + "object", b"content", content_type=TYPE)

    answer = httpx.get(
        store.presign_get(prefix + "object", expires=MINUTE, filename=filename), timeout=PATIENCE_SECONDS
    )

    assert answer.content == b"content"
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith('attachment; filename="')
    assert disposition.count('"') == 2
    assert "x-evil" not in answer.headers
    encoded = disposition.partition("filename*=UTF-8''")[2]
    assert httpx.QueryParams(f"name={encoded.replace('+', '%2B')}")["name"] == filename


def test_a_presigned_upload_stores_the_object(store: S3ObjectStore, prefix: str) -> None:
    answer = httpx.put(
        store.presign_put(prefix + "object", expires=MINUTE), content=b"from outside", timeout=PATIENCE_SECONDS
    )
    assert answer.status_code == 200
    assert store.hash_object(prefix + "object") == _describe(b"from outside")


def test_a_presigned_url_opens_one_object_for_one_verb_only(store: S3ObjectStore, prefix: str) -> None:
    store.put_bytes(prefix + "mine", b"mine", content_type=TYPE)
    store.put_bytes(prefix + "other", b"other", content_type=TYPE)
    url = store.presign_internal_get(prefix + "mine", expires=MINUTE)

    assert httpx.get(url, timeout=PATIENCE_SECONDS).content == b"mine"
    assert httpx.get(url.replace("mine", "other"), timeout=PATIENCE_SECONDS).status_code == 403
    assert httpx.put(url, content=b"overwritten", timeout=PATIENCE_SECONDS).status_code == 403
    assert httpx.get(url.replace("X-Amz-Expires=60", "X-Amz-Expires=6000"), timeout=PATIENCE_SECONDS).status_code == 403
    assert httpx.get(url.partition("?")[0], timeout=PATIENCE_SECONDS).status_code == 403


def test_tenants_urls_name_the_public_endpoint_and_the_trainers_the_internal_one(
    config: StorageConfig, prefix: str
) -> None:
    store = S3ObjectStore(replace(config, public_endpoint="objects.example.com"))
    public = store.presign_get(prefix + "x", expires=MINUTE, filename="x")
    internal = store.presign_put(prefix + "x", expires=MINUTE), store.presign_internal_get(prefix + "x", expires=MINUTE)
    assert urlsplit(public).netloc == "objects.example.com"
    assert {urlsplit(url).netloc for url in internal} == {config.endpoint}


def test_a_wrong_secret_is_refused_as_our_own_error(config: StorageConfig, prefix: str) -> None:
    store = S3ObjectStore(replace(config, secret_key="wrong"))
    with pytest.raises(StorageUnavailableError):
        store.put_bytes(prefix + "object", b"x", content_type=TYPE)
    with pytest.raises(StorageUnavailableError):
        store.stat(prefix + "object")


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
    assert store.put_bytes("tests/x", b"x", content_type=TYPE) == _describe(b"x")


def test_the_secret_is_not_shown(config: StorageConfig) -> None:
    assert config.secret_key not in repr(config)


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


@pytest.mark.parametrize("key", ["other/x", "/tenants/x", "tenants/../x", ""])
def test_only_keys_that_the_service_has_made_are_signed(store: S3ObjectStore, key: str) -> None:
    for sign in (store.presign_put, store.presign_internal_get):
        with pytest.raises(ValueError, match="Only keys"):
            sign(key, expires=MINUTE)
    with pytest.raises(ValueError, match="Only keys"):
        store.presign_get(key, expires=MINUTE, filename="x")


def test_no_url_lives_longer_than_fifteen_minutes(store: S3ObjectStore, prefix: str) -> None:
    assert store.presign_put(prefix + "x", expires=timedelta(minutes=15))
    for lifetime in (timedelta(minutes=15, seconds=1), timedelta()):
        with pytest.raises(ValueError, match="at most"):
            store.presign_put(prefix + "x", expires=lifetime)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_store_that_is_given_the_time_signs_with_it_and_not_with_its_hosts_clock(
    config: StorageConfig, prefix: str, hours: int
) -> None:
    """A host that is an hour off, seen from the server, is the same as a server that is, seen from the host."""

    def read_clock() -> dt.datetime:
        return dt.datetime.now(dt.UTC) + timedelta(hours=hours)

    wrong = S3ObjectStore(config, now=read_clock)
    for request in (
        lambda: wrong.put_bytes(prefix + "object", b"x", content_type=TYPE),
        lambda: wrong.stat(prefix + "object"),
        lambda: list(wrong.list_keys(prefix)),
    ):
        with pytest.raises(StorageUnavailableError):
            request()
    signed_at = f"X-Amz-Date={read_clock():%Y%m%dT%H}"
    assert signed_at in wrong.presign_internal_get(prefix + "object", expires=MINUTE)
    assert signed_at in wrong.presign_put(prefix + "object", expires=MINUTE)
    assert signed_at in wrong.presign_get(prefix + "object", expires=MINUTE, filename="x")


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


@pytest.mark.parametrize(
    ("changes", "url", "scope"),
    [
        ({}, "http://s3.example/espalier/", "us-east-1"),
        ({"region": "eu-central-1"}, "http://s3.example/espalier/", "eu-central-1"),
        ({"addressing": "virtual", "secure": True}, "https://espalier.s3.example/", "us-east-1"),
        (
            {"endpoint": "s3.eu-west-3.amazonaws.com", "secure": True},
            "https://espalier.s3.eu-west-3.amazonaws.com/",
            "eu-west-3",
        ),
        (
            {"endpoint": "s3.eu-west-3.amazonaws.com", "secure": True, "addressing": "path"},
            "https://s3.eu-west-3.amazonaws.com/espalier/",
            "eu-west-3",
        ),
        (
            {"public_endpoint": "files.example", "is_public_secure": True},
            "https://files.example/espalier/",
            "us-east-1",
        ),
    ],
)
def test_a_url_is_signed_for_the_region_and_in_the_style_of_its_host(
    changes: dict[str, Any], url: str, scope: str, prefix: str
) -> None:
    config = StorageConfig("s3.example", "key", "secret", "espalier")
    signed = S3ObjectStore(replace(config, **changes)).presign_get(f"{prefix}a", expires=MINUTE, filename="a")
    assert signed.startswith(f"{url}{prefix}a?")
    (credential,) = parse_qs(urlsplit(signed).query)["X-Amz-Credential"]
    assert credential.split("/")[2:] == [scope, "s3", "aws4_request"]


@contextmanager
def answering(answers: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Another's server: answers of a kind and a content by the path or the action that is asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            action = dict(parse_qsl(parts.query)).get("Action")
            kind, content = answers[action or parts.path]
            self.send_response(200)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(content.encode())

        do_POST = do_PUT = do_GET

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


LATER = "2099-01-01T00:00:00Z"
ROLE = '{"AccessKeyId": "%s", "SecretAccessKey": "%s", "Token": "t", "Expiration": "%s"}'
IDENTITY = (
    '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
    "<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>%s</AccessKeyId>"
    "<SecretAccessKey>%s</SecretAccessKey><SessionToken></SessionToken><Expiration>%s</Expiration></Credentials>"
    "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
)


@pytest.fixture
def keyless(config: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> StorageConfig:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return replace(config, access_key=None, secret_key=None)


def test_keys_may_come_from_the_environment(
    keyless: StorageConfig, config: StorageConfig, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(config.access_key))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(config.secret_key))
    stored = S3ObjectStore(keyless).put_bytes(f"{prefix}a", b"content", content_type=TYPE)
    assert stored == _describe(b"content")


def test_keys_may_come_by_a_web_identity(
    keyless: StorageConfig, config: StorageConfig, tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("a.web.token")
    identity = IDENTITY % (config.access_key, config.secret_key, LATER)
    with answering({"AssumeRoleWithWebIdentity": ("text/xml", identity)}) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/espalier")
        stored = S3ObjectStore(keyless).put_bytes(f"{prefix}a", b"content", content_type=TYPE)
    assert stored == _describe(b"content")


def test_keys_may_be_those_of_the_containers_role(
    keyless: StorageConfig, config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = ROLE % (config.access_key, config.secret_key, LATER)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")  # is asked for web identities only
    with answering({"/role": ("application/json", role)}) as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{url}/role")
        signed = S3ObjectStore(keyless).presign_put("tenants/a/b", expires=MINUTE)
    (credential,) = parse_qs(urlsplit(signed).query)["X-Amz-Credential"]
    assert credential.startswith(f"{config.access_key}/")


def test_keys_may_be_those_of_the_machines_role(
    keyless: StorageConfig, config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = "/latest/meta-data/iam/security-credentials/"
    answers = {
        "/latest/api/token": ("text/plain", "a-token"),
        roles: ("text/plain", "espalier"),
        f"{roles}espalier": ("application/json", ROLE % (config.access_key, config.secret_key, LATER)),
    }
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")  # is asked for web identities only
    with answering(answers) as url:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        signed = S3ObjectStore(keyless).presign_put("tenants/a/b", expires=MINUTE)
    (credential,) = parse_qs(urlsplit(signed).query)["X-Amz-Credential"]
    assert credential.startswith(f"{config.access_key}/")


def test_where_nobody_has_keys_the_error_says_what_to_set(
    keyless: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:9/role")
    with pytest.raises(StorageUnavailableError, match="access key and secret key"):
        S3ObjectStore(keyless).ensure_bucket()
