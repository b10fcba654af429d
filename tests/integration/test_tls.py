"""Redis and S3 over TLS: a server with the wrong certificate is refused."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError as BrokerError

from api.rate_limits import RateLimiter
from core.domain.ids import new_id
from core.queue import WakeUpPublisher, connect_broker, queue_name
from core.storage import S3ObjectStore, StorageUnavailableError, host_time
from local.servers import ServerAddresses
from tests.faults import FaultProxy, port_of
from tests.managed import HOST, Authority

POOL = "acme/tls@none"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "ours").mkdir()
    return Authority(tmp_path / "ours")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    (tmp_path / "theirs").mkdir()
    return Authority(tmp_path / "theirs")


@contextmanager
def tls_in_front_of(
    port: int, authority: Authority, *, host: str = HOST, are_clients_asked: bool = False
) -> Iterator[int]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue(host))
    if are_clients_asked:
        context.load_verify_locations(authority.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    with FaultProxy(port, ssl=context) as proxy:
        yield proxy.port


def redis_url(servers: ServerAddresses, port: int, ca_file: Path) -> str:
    password = urlsplit(servers.redis_url).password
    return f"rediss://:{password}@{HOST}:{port}/0?ssl_ca_certs={ca_file}"


def connect_as_consumer(celery: Celery) -> None:
    """Connect as a worker's consumer does."""
    with celery.connection_for_read() as connection:
        connection.default_channel.client.ping()


def test_wake_ups_and_counts_go_by_tls(servers: ServerAddresses, authority: Authority) -> None:
    with tls_in_front_of(port_of(servers.redis_url), authority) as port:
        url = redis_url(servers, port, authority.ca_file)
        with WakeUpPublisher(url) as publisher, redis.Redis.from_url(servers.redis_url) as client:
            assert publisher.publish(POOL)
            assert client.llen(queue_name(POOL)) == 1
            client.delete(queue_name(POOL))
        connect_as_consumer(connect_broker(url))
        assert RateLimiter(url, now=host_time).count(new_id(), limit=10) is not None


@pytest.mark.parametrize("fault", ["authority", "host"])
def test_nobody_speaks_to_a_redis_with_a_strange_certificate(
    fault: str, servers: ServerAddresses, authority: Authority, stranger: Authority
) -> None:
    signer, host = (stranger, HOST) if fault == "authority" else (authority, "redis.example")
    with tls_in_front_of(port_of(servers.redis_url), signer, host=host) as port:
        url = redis_url(servers, port, authority.ca_file)
        with WakeUpPublisher(url) as publisher, pytest.raises((redis.ConnectionError, BrokerError)):
            publisher.publish(POOL)
        with pytest.raises((redis.ConnectionError, BrokerError), match="certificate verify failed"):
            connect_as_consumer(connect_broker(url))
        limiter = RateLimiter(url, now=host_time)
        assert limiter.count(new_id(), limit=10) is None


def test_a_redis_that_asks_for_a_certificate_gets_ours(servers: ServerAddresses, authority: Authority) -> None:
    certificate, key = authority.issue("client")
    with tls_in_front_of(port_of(servers.redis_url), authority, are_clients_asked=True) as port:
        url = redis_url(servers, port, authority.ca_file)
        assert RateLimiter(url, now=host_time).count(new_id(), limit=10) is None
        url += f"&ssl_certfile={certificate}&ssl_keyfile={key}"
        assert RateLimiter(url, now=host_time).count(new_id(), limit=10) is not None
        connect_as_consumer(connect_broker(url))


def test_a_consumer_verifies_without_being_told_an_authority(servers: ServerAddresses, authority: Authority) -> None:
    with tls_in_front_of(port_of(servers.redis_url), authority) as port:
        url = redis_url(servers, port, authority.ca_file).partition("?")[0]
        with pytest.raises((redis.ConnectionError, BrokerError), match="certificate verify failed"):
            connect_as_consumer(connect_broker(url))


@pytest.mark.parametrize("fault", [None, "authority", "host"])
def test_the_store_is_reached_by_https_that_is_verified(
    fault: str | None, servers: ServerAddresses, authority: Authority, stranger: Authority
) -> None:
    signer = stranger if fault == "authority" else authority
    host = "s3.example" if fault == "host" else HOST
    with tls_in_front_of(port_of(servers.storage.url), signer, host=host) as port:
        secure = replace(
            servers.storage,
            endpoint=f"{HOST}:{port}",
            secure=True,
            ca_bundle=str(authority.ca_file),
            region="eu-central-1",
        )
        store = S3ObjectStore(secure)
        if fault is None:
            assert not store.ensure_bucket()
        else:
            with pytest.raises(StorageUnavailableError):
                store.ensure_bucket()
