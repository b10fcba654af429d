"""What the service needs of an S3 server, tried on the server itself, one check for each need.

All objects are stored below one prefix in the bucket and deleted at the end. A failed check says what the server did. A
server that lacks something that this version does not need still passes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

import httpx
from minio.datatypes import PostPolicy

from core.domain.objects import tenant_prefix
from core.settings import StorageConfig
from core.storage import PART_BYTES, S3ObjectStore, StorageError, connect_client
from core.tls import trusted_certificates

_TYPE = "application/octet-stream"
_MINUTE = dt.timedelta(minutes=1)
_SECONDS = 15.0
_MAX_SKEW_SECONDS = 60
_POST_LIMIT_BYTES = 1024
_BODY = bytes(range(256)) * 16


class _FailedError(Exception):
    """The server did something other than required."""


@dataclass(frozen=True)
class CheckResult:
    name: str
    says: str
    is_ok: bool
    is_needed: bool


def run_s3_checks(config: StorageConfig) -> Iterator[CheckResult]:
    """Yield the results in the order of the checks. Without the bucket no other check is made."""
    server = _Server(config)
    first = _run(server, "bucket", _check_bucket, is_needed=True)
    yield first
    if not first.is_ok:
        return
    try:
        for name, check in _NEEDED.items():
            yield _run(server, name, check, is_needed=True)
        for name, check in _ADVISED.items():
            yield _run(server, name, check, is_needed=False)
    finally:
        server.clean()


class _Server:
    """One server under test: our own store on it, a plain client, and a prefix for what is stored."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self.store = S3ObjectStore(config)
        self.client = connect_client(config)
        self.http = httpx.Client(timeout=_SECONDS, trust_env=False, verify=trusted_certificates(config.ca_bundle))
        self.prefix = tenant_prefix(uuid.uuid4())
        self.url = f"{config.url}/{config.bucket}"

    def put(self, name: str, body: bytes = _BODY) -> str:
        key = self.prefix + name
        self.store.put_bytes(key, body, content_type=_TYPE)
        return key

    def clean(self) -> None:
        self.http.close()
        try:
            self.store.delete_prefix(self.prefix)
        except StorageError:
            return  # the checks have already reported this server's faults


def _run(server: _Server, name: str, check: Callable[[_Server], str], *, is_needed: bool) -> CheckResult:
    try:
        return CheckResult(name, check(server), is_ok=True, is_needed=is_needed)
    except (_FailedError, StorageError, httpx.HTTPError, ValueError) as error:
        said = str(error) or type(error).__name__
        return CheckResult(name, said, is_ok=False, is_needed=is_needed)


def _check_bucket(server: _Server) -> str:
    name = server.config.bucket
    key = server.prefix + "bucket"
    try:
        server.store.stat(key)
        server.put("bucket")
    except StorageError as error:
        raise _FailedError(f"{name} takes no object: {error} Is it there (espalier bucket create)?") from error
    return f"{name} takes an object"


def _check_round_trip(server: _Server) -> str:
    key = server.put("round-trip")
    _expect(b"".join(server.store.get_stream(key)) == _BODY, "what is read is not what was stored")
    server.put("round-trip", b"again")
    _expect(b"".join(server.store.get_stream(key)) == b"again", "what was written last is not what is read")
    return "what is stored is read, and the last write wins"


def _check_listing(server: _Server) -> str:
    keys = sorted(server.put(f"listing/{number}") for number in range(3))
    _expect(sorted(server.store.list_keys(server.prefix + "listing/")) == keys, "a listing is not what was stored")
    server.store.delete_prefix(server.prefix + "listing/")
    _expect(not list(server.store.list_keys(server.prefix + "listing/")), "what was deleted is still listed")
    return "objects are listed by prefix, and deleted ones are gone"


def _check_multipart(server: _Server) -> str:
    parts = [bytes([number]) * PART_BYTES for number in range(2)] + [b"the rest"]
    stored = server.store.put_stream(server.prefix + "parts", iter(parts), content_type=_TYPE)
    _expect(stored.sha256 == hashlib.sha256(b"".join(parts)).hexdigest(), "the parts were not sent as they are")
    _expect(server.store.hash_object(server.prefix + "parts") == stored, "three parts came back as something else")
    return f"{stored.size_bytes // 2**20} MiB in three parts come back byte for byte"


def _check_open_uploads(server: _Server) -> str:
    def broken() -> Iterator[bytes]:
        yield bytes(PART_BYTES + 1)
        raise _FailedError

    try:
        server.store.put_stream(server.prefix + "open", broken(), content_type=_TYPE)
    except _FailedError:
        left = server.store.abort_uploads(server.prefix, min_age=dt.timedelta(days=-1))
        _expect(left == 0, f"{left} uploads that were given up are still open")
    return "an upload that is given up leaves no parts, and open ones are listed"


def _check_range(server: _Server) -> str:
    url = server.store.presign_internal_get(server.put("range"), expires=_MINUTE)
    answer = server.http.get(url, headers={"range": "bytes=100-199"})
    _expect(answer.status_code == httpx.codes.PARTIAL_CONTENT, f"a range is answered with {answer.status_code}")
    _expect(answer.content == _BODY[100:200], "a range holds other bytes than were asked for")
    return "a range of bytes is answered with 206 and those bytes"


def _check_presigned_get(server: _Server) -> str:
    key = server.put("download")
    url = server.client.presigned_get_object(
        server.config.bucket,
        key,
        expires=_MINUTE,
        response_headers={"response-content-disposition": 'attachment; filename="adapter.tar"'},
    )
    answer = server.http.get(url)
    _expect(answer.status_code == httpx.codes.OK, f"a signed URL is answered with {answer.status_code}")
    _expect(answer.content == _BODY, "a signed URL brings other bytes than were stored")
    named = answer.headers.get("content-disposition", "")
    _expect("adapter.tar" in named, "the file name that a signed URL asks for is not answered")
    other = server.http.get(url.replace("download", "bucket", 1))
    _expect(_is_refused(other), f"a URL that was signed for another object is answered with {other.status_code}")
    return "a signed URL brings its object under the name asked for, and no other object"


def _check_expiry(server: _Server) -> str:
    past = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    url = server.client.presigned_get_object(
        server.config.bucket, server.put("expiry"), expires=_MINUTE, request_date=past
    )
    answer = server.http.get(url)
    _expect(_is_refused(answer), f"a URL that expired an hour ago is answered with {answer.status_code}")
    return "a signed URL that has expired is refused"


def _check_presigned_put(server: _Server) -> str:
    url = server.store.presign_put(server.prefix + "upload", expires=_MINUTE)
    answer = server.http.put(url, content=_BODY)
    _expect(answer.is_success, f"an upload by a signed URL is answered with {answer.status_code}")
    _expect(b"".join(server.store.get_stream(server.prefix + "upload")) == _BODY, "it stored other bytes")
    return "a signed URL stores an object"


def _check_wrong_secret(server: _Server) -> str:
    key = server.put("secret")
    wrong = replace(server.config, access_key=server.config.access_key or "stranger", secret_key=uuid.uuid4().hex)
    stranger = S3ObjectStore(wrong)
    answer = server.http.get(stranger.presign_internal_get(key, expires=_MINUTE))
    _expect(_is_refused(answer), f"a request signed with a wrong secret is answered with {answer.status_code}")
    try:
        stranger.put_bytes(server.prefix + "strange", b"", content_type=_TYPE)
    except StorageError:
        return "a wrong secret reads and writes nothing"
    raise _FailedError("a wrong secret stores objects")


def _check_anonymous(server: _Server) -> str:
    answer = server.http.get(f"{server.url}/{server.put('anonymous')}")
    _expect(_is_refused(answer), f"a request without a signature is answered with {answer.status_code}")
    listing = server.http.get(server.url)
    _expect(_is_refused(listing), f"a listing without a signature is answered with {listing.status_code}")
    return "nobody reads or lists without a signature"


def _check_clock(server: _Server) -> str:
    answer = server.http.get(server.url)
    _expect("date" in answer.headers, "it does not tell its time")
    skew_seconds = (parsedate_to_datetime(answer.headers["date"]) - dt.datetime.now(dt.UTC)).total_seconds()
    says = f"its clock is {abs(skew_seconds):.0f} s {'ahead of' if skew_seconds > 0 else 'behind'} this machine's"
    _expect(abs(skew_seconds) <= _MAX_SKEW_SECONDS, f"{says}; signed URLs live by both")
    return says


def _check_post_limits(server: _Server) -> str:
    with _posting(server, "posted") as post:
        small, large = post(bytes(_POST_LIMIT_BYTES)), post(bytes(_POST_LIMIT_BYTES + 1))
    _expect(small.is_success, f"a form within its limit is answered with {small.status_code}")
    _expect(large.is_client_error, f"a form beyond its limit is answered with {large.status_code}")
    return "a signed form stores an object up to its limit, and none beyond"


@contextmanager
def _posting(server: _Server, name: str) -> Iterator[Callable[[bytes], httpx.Response]]:
    """Yield a function that sends a body with a signed form, whose policy limits the body's length."""
    key = server.prefix + name
    policy = PostPolicy(server.config.bucket, dt.datetime.now(dt.UTC) + _MINUTE)
    policy.add_equals_condition("key", key)
    policy.add_content_length_range_condition(1, _POST_LIMIT_BYTES)
    form = {**server.client.presigned_post_policy(policy), "key": key}
    yield lambda body: server.http.post(server.url, data=form, files={"file": (name, body, _TYPE)})


def _check_conditional_put(server: _Server) -> str:
    url = server.store.presign_put(server.prefix + "once", expires=_MINUTE)
    first, second = (server.http.put(url, content=body, headers={"if-none-match": "*"}) for body in (b"1", b"2"))
    _expect(first.is_success, f"a first conditional write is answered with {first.status_code}")
    _expect(
        second.status_code in {httpx.codes.PRECONDITION_FAILED, httpx.codes.CONFLICT},
        f"a second conditional write is answered with {second.status_code}",
    )
    return "a write on condition that there is nothing is done once"


def _is_refused(answer: httpx.Response) -> bool:
    """Return whether the server refuses. A 404 is no refusal, because the server has looked for the object."""
    return answer.is_client_error and answer.status_code != httpx.codes.NOT_FOUND


def _expect(is_true: bool, otherwise: str) -> None:  # noqa: FBT001 (an assertion's shape)
    if not is_true:
        raise _FailedError(otherwise)


_NEEDED = {
    "round trip": _check_round_trip,
    "listing": _check_listing,
    "multipart": _check_multipart,
    "open uploads": _check_open_uploads,
    "range": _check_range,
    "presigned GET": _check_presigned_get,
    "expiry": _check_expiry,
    "presigned PUT": _check_presigned_put,
    "wrong secret": _check_wrong_secret,
    "anonymous": _check_anonymous,
    "clock": _check_clock,
}
_ADVISED = {"POST limits": _check_post_limits, "conditional put": _check_conditional_put}
