"""Checks Redis, the object store and the API, in the way their clients use them."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import redis

from cli.doctor.findings import Finding, failed, ok, skipped, warning
from cli.reporting import describe_error
from core.domain.ids import new_id
from core.domain.objects import tenant_prefix
from core.redis_urls import read_redis_url
from core.settings import StorageConfig
from core.storage import S3ObjectStore, StorageError
from core.tls import trusted_certificates

_TIMEOUT_SECONDS = 10
_WORDS = b"espalier doctor was here"
_MAX_SKEW_SECONDS = 300.0  # S3 refuses signatures that are 15 minutes off


def check_redis(redis_url: str) -> Finding:
    """Check that Redis answers, evicts no message when memory is short, and keeps its messages through a restart."""
    try:
        with _connect(redis_url) as client:
            facts: Any = client.info()
    except redis.RedisError as error:
        return failed("redis", describe_error(error), remedy="See that ESPALIER_REDIS_URL and the network let it in.")
    policy = facts.get("maxmemory_policy")
    named = f"{facts.get('server_name') or 'Redis'} {facts.get('valkey_version') or facts.get('redis_version')}"
    if policy != "noeviction":
        remedy = "Set maxmemory-policy to noeviction: wake-ups may not be thrown away."
        return failed("redis", f"{named} answers; it evicts by {policy}.", remedy=remedy)
    if not facts.get("aof_enabled") and not _saves(redis_url):
        says = f"{named} answers; it keeps nothing through a restart."
        return warning(
            "redis", says, remedy="Set appendonly to yes. Without it workers are woken late after a restart."
        )
    return ok("redis", f"{named} answers, evicts nothing and persists.")


def _connect(redis_url: str) -> redis.Redis:
    arguments = read_redis_url(redis_url).arguments
    return redis.Redis.from_url(**arguments, socket_timeout=_TIMEOUT_SECONDS, socket_connect_timeout=_TIMEOUT_SECONDS)


def _saves(redis_url: str) -> bool:
    """Return whether snapshots are taken. A managed server does not say; then its operator is trusted."""
    try:
        with _connect(redis_url) as client:
            settings: Any = client.config_get("save")
            return bool(settings.get("save"))
    except redis.RedisError:
        return True


def check_storage(config: StorageConfig) -> Iterator[Finding]:
    """Put, read, fetch by a signed link and delete an object that belongs to no tenant. It is deleted in any case."""
    store = S3ObjectStore(config)
    object_key = f"{tenant_prefix(uuid.UUID(int=0))}doctor/{new_id()}"
    place = f"the bucket {config.bucket!r} at {config.endpoint}"
    try:
        store.put_bytes(object_key, _WORDS, content_type="text/plain")
    except (StorageError, ValueError) as error:
        yield failed("storage put", str(error), remedy=_remedy(config))
        return
    yield ok("storage put", f"An object can be put in {place}.")
    try:
        yield _check_reading(store, config, object_key)
        yield _check_link(store, config, object_key)
    finally:
        deleted = _check_deletion(store, config, object_key)
    yield deleted


def _check_reading(store: S3ObjectStore, config: StorageConfig, object_key: str) -> Finding:
    try:
        content = b"".join(store.get_stream(object_key))
    except StorageError as error:
        return failed("storage get", str(error), remedy=_remedy(config))
    if content != _WORDS:
        remedy = "Look at what stands between this host and the object store."
        return failed("storage get", "An object came back changed.", remedy=remedy)
    return ok("storage get", "What was put can be read back.")


def _remedy(config: StorageConfig) -> str:
    return f"See that the bucket {config.bucket!r} is there, and that the key may put, get, list and delete in it."


def _check_link(store: S3ObjectStore, config: StorageConfig, object_key: str) -> Finding:
    """Fetch the object as a tenant does: by a link to the public endpoint, without a key."""
    link = store.presign_get(object_key, expires=timedelta(minutes=1), filename="doctor.txt")
    place = config.public_endpoint or config.endpoint
    remedy = "Set ESPALIER_S3_PUBLIC_ENDPOINT to the host and port by which tenants reach the object store."
    try:
        trusted = trusted_certificates(config.ca_bundle)
        answer = httpx.get(link, timeout=_TIMEOUT_SECONDS, trust_env=False, verify=trusted)
    except httpx.HTTPError as error:
        if _is_loopback(place) and not _is_loopback(config.endpoint):
            says = f"Signed links name {place}: only clients on the host of the store's port reach it."
            return skipped("storage link", says, remedy="Fetch the file of an adapter from there.")
        says = f"A signed link to {place} cannot be fetched from here: {type(error).__name__}."
        return failed("storage link", says, remedy=remedy)
    if answer.content != _WORDS:
        return failed("storage link", f"A signed link to {place} is answered {answer.status_code}.", remedy=remedy)
    skew = _skew_of(answer)
    if skew > _MAX_SKEW_SECONDS:
        says = f"The object store's clock and this host's differ by {skew:.0f} s."
        return failed("storage link", says, remedy="Let both follow a time server: links are signed by these clocks.")
    server = answer.headers.get("server") or "the object store"
    return ok("storage link", f"A signed link to {place} can be fetched; {server} has the same time.")


def _is_loopback(endpoint: str) -> bool:
    """Return whether an endpoint, host:port, means the host of the caller. A container is another host."""
    host = endpoint.rpartition(":")[0].strip("[]") or endpoint
    return host in ("localhost", "::1") or host.startswith("127.")


def _skew_of(answer: httpx.Response) -> float:
    told = answer.headers.get("date")
    if told is None:
        return 0.0
    return abs((dt.datetime.now(dt.UTC) - parsedate_to_datetime(told)).total_seconds())


def _check_deletion(store: S3ObjectStore, config: StorageConfig, object_key: str) -> Finding:
    try:
        store.delete(object_key)
        is_gone = store.stat(object_key) is None
    except StorageError as error:
        return failed("storage delete", str(error), remedy=_remedy(config))
    if not is_gone:
        return failed("storage delete", "An object is still there after it was deleted.", remedy=_remedy(config))
    return ok("storage delete", "What was stored is deleted again.")


def check_api(api_url: str) -> Finding:
    """Check that the API is ready, which includes its database."""
    remedy = "See that `python -m api` runs, and what its log says."
    try:
        answer = httpx.get(f"{api_url.rstrip('/')}/readyz", timeout=_TIMEOUT_SECONDS, trust_env=False)
    except httpx.HTTPError as error:
        return failed("api", f"{api_url} does not answer: {type(error).__name__}.", remedy=remedy)
    if not answer.is_success:
        return failed("api", f"{api_url} answers, and is not ready ({answer.status_code}).", remedy=remedy)
    return ok("api", f"{api_url} is ready.")
