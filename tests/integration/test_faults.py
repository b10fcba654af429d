"""The fault proxy does what it says, in front of the real servers."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psycopg
import pytest
import redis

from core.storage import S3ObjectStore, StorageUnavailableError
from local.servers import ServerAddresses
from tests.faults import Answer503, Cut, CutAfter, Delay, FaultProxy, FlipByte, Hang, port_of, with_port
from tests.waiting import PATIENCE_SECONDS, takes_at_least, wait_until


@pytest.fixture
def redis_proxy(servers: ServerAddresses) -> Iterator[FaultProxy]:
    with FaultProxy(port_of(servers.redis_url)) as proxy:
        yield proxy


@pytest.fixture
def client(servers: ServerAddresses, redis_proxy: FaultProxy) -> Iterator[redis.Redis]:
    url = with_port(servers.redis_url, redis_proxy.port)
    with redis.Redis.from_url(url, socket_timeout=PATIENCE_SECONDS, retry=None) as made:
        yield made


@pytest.fixture
def s3_proxy(servers: ServerAddresses) -> Iterator[FaultProxy]:
    with FaultProxy(int(servers.storage.endpoint.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
def store(servers: ServerAddresses, s3_proxy: FaultProxy) -> S3ObjectStore:
    return S3ObjectStore(replace(servers.storage, endpoint=f"127.0.0.1:{s3_proxy.port}"))


def test_without_a_fault_everything_passes(client: redis.Redis, redis_proxy: FaultProxy) -> None:
    assert client.ping()
    assert redis_proxy.num_hits == 0


def test_a_cut_ends_open_connections_and_new_ones_and_is_over_when_it_is_over(
    client: redis.Redis, redis_proxy: FaultProxy
) -> None:
    client.ping()
    with redis_proxy.during(Cut()):
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.ping()
    assert client.ping()
    assert redis_proxy.num_hits >= 2


def test_a_hang_keeps_connections_and_what_was_sent_arrives_after_it(
    client: redis.Redis, redis_proxy: FaultProxy
) -> None:
    name = f"faults:{uuid.uuid4()}"
    client.ping()
    with ThreadPoolExecutor(1) as pool:
        with redis_proxy.during(Hang()):
            landing = pool.submit(client.set, name, "landed")
            wait_until(lambda: redis_proxy.num_hits > 0, what="what is sent")
            assert not landing.done()
        assert landing.result() is True
    assert client.getdel(name) == b"landed"


def test_a_delay_comes_on_top(client: redis.Redis, redis_proxy: FaultProxy) -> None:
    client.ping()
    with redis_proxy.during(Delay(0.1)), takes_at_least(0.2):  # the question and the answer are both late
        client.ping()


def test_an_object_store_that_refuses_is_tried_again_and_then_unavailable(
    store: S3ObjectStore, s3_proxy: FaultProxy
) -> None:
    key = f"faults/{uuid.uuid4()}"
    with s3_proxy.during(Answer503()), pytest.raises(StorageUnavailableError):
        store.put_bytes(key, b"x" * 200_000, content_type="text/plain")
    assert s3_proxy.num_hits > 1
    assert store.stat(key) is None
    store.put_bytes(key, b"x", content_type="text/plain")
    store.delete(key)


def test_a_flipped_byte_changes_what_is_read_and_not_what_is_stored(store: S3ObjectStore, s3_proxy: FaultProxy) -> None:
    key, body = f"faults/{uuid.uuid4()}", bytes(300_000)
    store.put_bytes(key, body, content_type="text/plain")
    with s3_proxy.during(FlipByte()):
        read = b"".join(store.get_stream(key))
    assert sum(a != b for a, b in zip(read, body, strict=True)) == 1
    assert store.hash_object(key).sha256 == hashlib.sha256(body).hexdigest()
    store.delete(key)


def test_a_listing_that_was_changed_on_its_way_is_a_store_that_did_not_answer(
    store: S3ObjectStore, s3_proxy: FaultProxy
) -> None:
    with s3_proxy.during(FlipByte()), pytest.raises(StorageUnavailableError):
        list(store.list_keys("faults/"))


def test_a_cut_after_commit_leaves_the_row_and_takes_the_answer(servers: ServerAddresses) -> None:
    with FaultProxy(port_of(servers.postgres_url)) as proxy:
        table = f"faults_{uuid.uuid4().hex}"
        with psycopg.connect(servers.postgres_url, autocommit=True) as direct:
            direct.execute(f"create table {table} (word text)")
            connection = psycopg.connect(with_port(servers.postgres_url, proxy.port))
            connection.execute(f"insert into {table} values ('kept')")
            with proxy.during(CutAfter(b"COMMIT")), pytest.raises(psycopg.OperationalError):
                connection.commit()
            connection.close()
            assert direct.execute(f"select word from {table}").fetchall() == [("kept",)]
            direct.execute(f"drop table {table}")


def test_a_proxy_leaves_no_connection_behind(servers: ServerAddresses) -> None:
    with FaultProxy(port_of(servers.redis_url)) as proxy:
        client = redis.Redis.from_url(with_port(servers.redis_url, proxy.port))
        client.ping()
        proxy.inject(Hang())
        assert proxy.num_connections == 1
    assert proxy.num_connections == 0
    client.close()
