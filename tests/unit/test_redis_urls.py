"""URLs of Redis are read once for redis-py and Celery, and errors never quote them."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import ValidationError

from core.queue import connect_broker
from core.redis_urls import check_files, read_redis_url
from core.settings import ApiSettings, RedisSettings, ScheduleSettings, WorkerSettings, describe_faults
from tests.managed import Authority

VERIFIED = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://cache", ("cache", 6379, None, None, 0)),
        ("redis://cache/", ("cache", 6379, None, None, 0)),
        ("  redis://cache:6380/7\n", ("cache", 6380, None, None, 7)),
        ("redis://:p%40s%2Fs%25@cache/1", ("cache", 6379, None, "p@s/s%", 1)),
        ("redis://us%3Aer:p:w@10.0.0.1:1", ("10.0.0.1", 1, "us:er", "p:w", 0)),
        ("redis://user:p@w@my_cache", ("my_cache", 6379, "user", "p@w", 0)),
        ("redis://user@cache", ("cache", 6379, "user", None, 0)),
        ("redis://:p%C3%A4ss@[::1]:65535/0", ("::1", 65535, None, "päss", 0)),
        ("rediss://user:pass@redis.example.com", ("redis.example.com", 6379, "user", "pass", 0)),
    ],
)
def test_redis_py_and_celery_are_led_to_the_same_place(url: str, place: tuple[Any, ...]) -> None:
    address = read_redis_url(url)
    with redis.Redis.from_url(**address.arguments) as client:
        named = client.connection_pool.connection_kwargs
    told = tuple(named.get(name) for name in ("host", "port", "username", "password", "db"))
    with connect_broker(url) as celery, celery.connection_for_write() as broker:
        asked = (broker.hostname, broker.port, broker.userid, broker.password, int(broker.virtual_host or 0))
    assert told == asked == place


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?ssl_cert_reqs=required",
        "?ssl_cert_reqs=CERT_REQUIRED",
        "?ssl_cert_reqs=ssl.CERT_REQUIRED&ssl_check_hostname=True",
    ],
)
def test_both_verify_the_certificate_and_the_name_always(query: str) -> None:
    url = f"rediss://cache{query}"
    assert read_redis_url(url).tls == VERIFIED
    with connect_broker(url) as celery, celery.connection_for_read() as broker:
        assert broker.ssl == VERIFIED
    assert read_redis_url("redis://cache").tls is None


def test_files_are_told_to_both() -> None:
    url = "rediss://cache/0?ssl_ca_certs=/etc/a%20b.pem&ssl_certfile=/c.pem&ssl_keyfile=/c.key"
    files = {"ssl_ca_certs": "/etc/a b.pem", "ssl_certfile": "/c.pem", "ssl_keyfile": "/c.key"}
    assert read_redis_url(url).tls == VERIFIED | files
    with connect_broker(url) as celery, celery.connection_for_read() as broker:
        assert broker.ssl == VERIFIED | files


LEAKY = [
    "redis://:hush/ret@cache:6379/0",
    "redis://12:3/hush@cache:6379/0",
    "redis://user:hush#x@cache",
    "redis://user:hush?x@cache",
    "redis://hush?ret@cache:6379",
    "redis://:hush@cache:port/0",
    "redis://:hush%ff@cache",
    "redis://:hush@[cache]/0",
    "redis://:hush@[::ffff:999.1.1.1]/0",
    "redis://:hush@\u2100cache/0",
    "redis://:hush@a,b/0",
    "redis://:hush@/0",
    "redis://:hush@:6379/0",
    "redis://:hush@cache/hush",
    "redis://:hush@cache/0/1",
    "redis://:hush@cache/0#hush",
    "REDIS://:hush@cache",
    "unix://:hush@/run/redis.sock",
    "sentinel://:hush@cache",
    "hush",
    "",
]


@pytest.mark.parametrize("url", LEAKY)
def test_what_is_no_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="This is no URL of a Redis") as refused:
        read_redis_url(url)
    assert "hush" not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


@pytest.mark.parametrize("port", [0, 65_536, 99_999])
def test_a_port_that_cannot_be_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 65535"):
        read_redis_url(f"redis://:hush@cache:{port}/0")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("rediss://cache?foo=hush", "takes the parameters"),
        ("rediss://cache?hush", "takes the parameters"),
        ("rediss://cache?db=3", "takes the parameters"),
        ("rediss://cache?ssl_ca_certs=", "takes the parameters"),
        ("rediss://cache?ssl_ca_certs=/a&ssl_ca_certs=/b", "takes the parameters"),
        ("rediss://cache?ssl_keyfile=/a", "takes the parameters"),
        ("redis://cache?ssl_ca_certs=/a", "takes none"),
        ("redis://cache?ssl_cert_reqs=required", "takes none"),
        ("rediss://cache?ssl_cert_reqs=none", "verified always"),
        ("rediss://cache?ssl_cert_reqs=CERT_OPTIONAL", "verified always"),
        ("rediss://cache?ssl_cert_reqs=hush", "verified always"),
        ("rediss://cache?ssl_cert_reqs=", "verified always"),
        ("rediss://cache?ssl_check_hostname=false", "verified always"),
    ],
)
def test_a_parameter_that_is_not_read_or_verifies_less_is_refused(url: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as refused:
        read_redis_url(url)
    assert "hush" not in str(refused.value)


def test_files_that_cannot_be_used_are_refused_at_the_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("client")
    good = f"rediss://cache?ssl_ca_certs={authority.ca_file}&ssl_certfile={certificate}&ssl_keyfile={key}"
    check_files(read_redis_url(good))
    check_files(read_redis_url("rediss://cache"))
    for wrong, named in ((authority.ca_file, "ssl_ca_certs"), (certificate, "ssl_certfile"), (key, "ssl_keyfile")):
        for other in (tmp_path / "absent.pem", key if named != "ssl_keyfile" else certificate):
            monkeypatch.setenv("ESPALIER_REDIS_URL", good.replace(str(wrong), str(other)))
            with pytest.raises(ValidationError) as refused:
                RedisSettings()
            assert f"ESPALIER_REDIS_URL (Value error, {'ssl_ca' if named == 'ssl_ca_certs' else 'ssl_certfile'}" in (
                describe_faults(refused.value)
            )


@pytest.mark.parametrize("kind", [ApiSettings, ScheduleSettings, WorkerSettings, RedisSettings])
@pytest.mark.parametrize("url", ["redis://:hush/ret@cache:6379/0", "redis://user:hush#x@cache", "redis://cache/hush"])
def test_no_process_takes_such_a_url_or_shows_it(kind: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_DATABASE_URL", "postgresql://somebody@nowhere/db")
    monkeypatch.setenv("ESPALIER_S3_ENDPOINT", "s3.example")
    monkeypatch.setenv("ESPALIER_REDIS_URL", url)
    with pytest.raises(ValidationError) as refused:
        kind()
    assert describe_faults(refused.value).startswith("ESPALIER_REDIS_URL (")
    assert "hush" not in str(refused.value) + describe_faults(refused.value)
