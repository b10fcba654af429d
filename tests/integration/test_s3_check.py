"""`espalier s3-check` and `espalier bucket`: on suitable and unsuitable servers, with their messages."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from core.settings import StorageConfig
from core.storage import S3ObjectStore
from local.ports import Ports
from local.processes import ChildProcess
from local.s3_server import S3Server, remove_abandoned_sockets
from local.servers import ServerAddresses
from tests.faults import Answer503, Cut, Fault, FaultProxy, FlipByte
from tests.processes import storage_settings
from tests.waiting import wait_until

Espalier = Callable[..., Result]


@pytest.fixture
def espalier(servers: ServerAddresses) -> Espalier:
    env = {
        **storage_settings(servers.storage),
        "ESPALIER_OWNER_DATABASE_URL": "",
    }

    def run(*words: str, **changed: str) -> Result:
        return CliRunner().invoke(app, list(words), env=env | changed, catch_exceptions=False)

    return run


@pytest.fixture
def proxy(servers: ServerAddresses) -> Iterator[FaultProxy]:
    with FaultProxy(int(servers.storage.endpoint.rpartition(":")[2])) as made:
        yield made


def verdicts(result: Result) -> dict[str, str]:
    """Return what is said of each check: ok, FAILED or lacks."""
    lines = [line for line in result.stdout.splitlines() if line.startswith(("ok ", "FAILED ", "lacks "))]
    return {line[8:23].strip(): line.split()[0] for line in lines}


def test_a_server_that_fits_passes_every_check_and_nothing_is_left_behind(
    espalier: Espalier, servers: ServerAddresses
) -> None:
    store = S3ObjectStore(servers.storage)
    before = set(store.list_keys("tenants/"))
    result = espalier("s3-check", f"http://{servers.storage.endpoint}")
    assert result.exit_code == 0, result.stdout
    found = verdicts(result)
    assert len(found) == 14
    assert set(found.values()) == {"ok"}, result.stdout
    assert set(store.list_keys("tenants/")) == before
    assert str(servers.storage.secret_key) not in result.stdout


def test_a_wrong_secret_ends_at_the_first_check(espalier: Espalier, servers: ServerAddresses) -> None:
    result = espalier("s3-check", f"http://{servers.storage.endpoint}", ESPALIER_S3_SECRET_KEY="another")
    assert result.exit_code == 1
    assert verdicts(result) == {"bucket": "FAILED"}


def test_a_bucket_that_is_not_there_is_told_and_made_by_a_command(espalier: Espalier, servers: ServerAddresses) -> None:
    name = f"made-{uuid.uuid4().hex[:8]}"
    url = f"http://{servers.storage.endpoint}/{name}"
    refused = espalier("s3-check", url)
    assert refused.exit_code == 1
    assert "espalier bucket create" in refused.stdout
    made, again = (espalier("bucket", "create", ESPALIER_S3_BUCKET=name) for _ in range(2))
    assert (made.exit_code, again.exit_code) == (0, 0)
    assert "has been made" in made.stdout
    assert "is there" in again.stdout
    assert espalier("s3-check", url).exit_code == 0


def test_a_server_that_changes_bytes_fails_where_bytes_count(espalier: Espalier, proxy: FaultProxy) -> None:
    with proxy.during(FlipByte()):
        result = espalier("s3-check", f"http://127.0.0.1:{proxy.port}")
    assert result.exit_code == 1
    found = verdicts(result)
    assert {found[name] for name in ("round trip", "multipart", "range", "presigned GET")} == {"FAILED"}
    assert found["clock"] == "ok"


@pytest.mark.parametrize("fault", [Cut(), Answer503()], ids=["cut", "503"])
def test_a_server_that_does_not_serve_fails(fault: Cut | Answer503, espalier: Espalier, proxy: FaultProxy) -> None:
    with proxy.during(fault):
        result = espalier("s3-check", f"http://127.0.0.1:{proxy.port}")
        assert espalier("bucket", "create", ESPALIER_S3_ENDPOINT=f"127.0.0.1:{proxy.port}").exit_code == 1
    assert result.exit_code == 1
    assert verdicts(result) == {"bucket": "FAILED"}


def test_making_the_bucket_may_wait_for_the_server(
    espalier: Espalier, proxy: FaultProxy, servers: ServerAddresses
) -> None:
    address = f"127.0.0.1:{proxy.port}"
    proxy.inject(Cut())
    with ThreadPoolExecutor(1) as beside:
        made = beside.submit(espalier, "bucket", "create", "--wait", "600", ESPALIER_S3_ENDPOINT=address)
        wait_until(lambda: proxy.num_hits > 0, what="a first try")
        proxy.inject(Fault())
        result = made.result()
    assert result.exit_code == 0
    assert f"Bucket {servers.storage.bucket} is there" in result.stdout


@pytest.fixture
def open_server(tmp_path: Path) -> Iterator[StorageConfig]:
    """A server that was started without keys and asks nobody for any."""
    server = S3Server(tmp_path, ports=Ports.choose(tmp_path / "ports.json").s3, access_key="any", secret_key="any")
    spec = server.prepare()
    env = {name: "" if name.startswith("AWS_") else value for name, value in spec.env.items()}
    child = ChildProcess(replace(spec, env=env), tmp_path)
    try:
        wait_until(server.answers, what="the S3 server")
        yield server.config
    finally:
        child.stop()
        remove_abandoned_sockets()


def test_a_server_that_asks_for_no_key_cannot_be_used(espalier: Espalier, open_server: StorageConfig) -> None:
    result = espalier("s3-check", f"http://{open_server.endpoint}")
    assert result.exit_code == 1
    found = verdicts(result)
    assert {found[name] for name in ("expiry", "wrong secret", "anonymous")} == {"FAILED"}
    assert found["multipart"] == "ok"


@pytest.mark.parametrize("url", ["minio:9000", "http://", "http://key:secret@minio:9000"])
def test_an_address_that_cannot_be_one_is_refused(url: str, espalier: Espalier) -> None:
    result = espalier("s3-check", url)
    assert result.exit_code == 2
    assert "secret@" not in result.stdout


def test_missing_keys_are_named(espalier: Espalier) -> None:
    missing = espalier("s3-check", "http://127.0.0.1:1", ESPALIER_S3_SECRET_KEY="", ESPALIER_S3_SECRET_KEY_FILE="/none")
    assert missing.exit_code == 2
    assert "ESPALIER_S3_SECRET_KEY_FILE names /none" in missing.stderr
    for words in (("bucket", "create"), ("s3-check", "http://127.0.0.1:1")):
        doubled = espalier(*words, ESPALIER_S3_SECRET_KEY_FILE="/none")
        assert doubled.exit_code == 2
        assert "are both set" in doubled.stderr
