"""Row 28: a wrong clock does no harm unless it is the database's."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
from sqlalchemy import Engine

from core.db.clock import MAX_OFFSET_SECONDS, DatabaseClock
from core.db.session import connect
from core.domain.ids import IdKind, format_id
from core.storage import S3ObjectStore
from local.ports import free_ports
from local.servers import ServerAddresses
from tests.clocks import fake_clock, find_faketime
from tests.databases import Database, run
from tests.factories.bases import BASE_MODEL
from tests.factories.jobs import claim, queue_job, status_of
from tests.factories.tenants import Tenant
from tests.faults import Cut, FaultProxy, port_of, with_port
from tests.integration.api.planting import plant
from tests.processes import leader_pid, running_api, schedule_process
from tests.waiting import PATIENCE_SECONDS, wait_until


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    run(owner, "truncate jobs, queues, leaders cascade")
    return worker


@pytest.mark.fault(28)
@pytest.mark.parametrize("hours", [1, -1])
def test_row_28_a_schedule_whose_clock_is_an_hour_wrong_expires_nothing_early_and_everything_in_time(
    hours: int, worker: Engine, owner: Engine, database: Database, servers: ServerAddresses, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    queue_job(owner, tenant)
    lost, live = claim(worker, lease_seconds=1), claim(worker, lease_seconds=1800)
    assert lost is not None
    assert live is not None
    wrong = {"ld_preload": find_faketime(), "faketime": f"{hours:+d}h", "dont_fake_monotonic": "1"}
    with schedule_process(database, servers, env=wrong, reap_interval_seconds="0.2") as process:
        wait_until(lambda: leader_pid(owner) == process.pid)
        wait_until(lambda: status_of(owner, lost) == "queued")
        assert status_of(owner, live) == "running"


@pytest.mark.fault(28)
@pytest.mark.parametrize("hours", [1, -1])
def test_row_28_an_api_whose_clock_is_an_hour_wrong_stores_files_and_hands_out_urls_that_open(
    hours: int, database: Database, servers: ServerAddresses, owner: Engine, tenant: Tenant, tmp_path: Path
) -> None:
    store, api = S3ObjectStore(servers.storage), connect(database.api_url)
    adapter = plant(owner, api, store, tenant).adapter
    (port,) = free_ports(1)
    wrong = fake_clock(tmp_path / "clock", f"{hours:+d}h")
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    with (
        running_api(database.api_url, servers.storage, port=port, env=wrong),
        httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", headers=headers, timeout=PATIENCE_SECONDS) as client,
    ):
        body = {"file": ("rows.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}')}
        sent = client.post("/files", data={"purpose": "fine-tune"}, files=body).raise_for_status().json()
        assert client.get(f"/files/{sent['id']}/content").is_success
        (file, *_) = client.get(f"/adapters/{adapter}/download").raise_for_status().json()["files"]
        signed_at = dt.datetime.strptime(parse_qs(file["url"])["X-Amz-Date"][0], "%Y%m%dT%H%M%S%z")
        assert abs(dt.datetime.now(dt.UTC) - signed_at) < dt.timedelta(minutes=5)
        assert httpx.get(file["url"], timeout=PATIENCE_SECONDS).is_success
    api.dispose()


@pytest.mark.fault(28)
def test_row_28_an_api_whose_clock_is_wrong_knows_a_retry_and_counts_in_the_windows_of_the_others(
    database: Database, servers: ServerAddresses, owner: Engine, tenant: Tenant, tmp_path: Path
) -> None:
    ports = free_ports(2)
    file_id = format_id(IdKind.FILE, queue_job(owner, tenant).training_file_id)
    order = {"model": BASE_MODEL, "training_file": file_id, "seed": 28}
    counting = {"ESPALIER_REDIS_URL": servers.redis_url}
    wrong = fake_clock(tmp_path / "clock", "+630s")
    with (
        running_api(database.api_url, servers.storage, port=ports[0], env=counting),
        running_api(database.api_url, servers.storage, port=ports[1], env=counting | wrong),
    ):
        ids = {ask_for_job(port, tenant, order, num_retries=number) for number, port in enumerate(ports)}
        assert len(ids) == 1, "the second was a retry of the first"

        def end_together() -> bool:
            first, second = (seconds_left(port, tenant) for port in ports)
            return (first - second) % 60 < 5

        wait_until(end_together, what="windows that end together")


def ask_for_job(port: int, tenant: Tenant, order: dict[str, Any], *, num_retries: int) -> str:
    headers = {"authorization": f"Bearer {tenant.api_key}", "x-stainless-retry-count": str(num_retries)}
    url = f"http://127.0.0.1:{port}/v1/fine_tuning/jobs"
    return str(httpx.post(url, json=order, headers=headers, timeout=PATIENCE_SECONDS).raise_for_status().json()["id"])


def seconds_left(port: int, tenant: Tenant) -> int:
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers, timeout=PATIENCE_SECONDS)
    return int(answer.headers["ratelimit"].rpartition("t=")[2])


def test_a_clock_goes_on_while_the_database_is_away_and_knows_it_when_it_is_back(database: Database) -> None:
    with FaultProxy(port_of(database.worker_url)) as proxy:
        engine = connect(with_port(database.worker_url, proxy.port))
        clock = DatabaseClock(engine)
        with proxy.during(Cut()):
            assert (clock.is_right(), clock.is_wrong, clock.offset_seconds) == (False, False, None)
            assert abs(dt.datetime.now(dt.UTC) - clock.now()) < dt.timedelta(seconds=1), "the host's, until it is asked"
        wait_until(clock.is_right, what="another look")
        with proxy.during(Cut()):
            assert clock.is_right()
            assert abs(dt.datetime.now(dt.UTC) - clock.now()) < dt.timedelta(seconds=5)
        engine.dispose()


def test_an_answer_that_was_long_on_its_way_proves_no_clock_wrong(worker: Engine) -> None:
    """Of a minute on the way, all may have been the way there, or the way back: the clock may be 30 s off, or right."""
    clock = DatabaseClock(worker)
    assert clock.is_right()
    read = clock._reading
    assert read is not None
    off = dt.timedelta(seconds=MAX_OFFSET_SECONDS + 10)
    for at, error_seconds, is_wrong in (
        (read.at + off, 30.0, False),
        (read.at + off, 1.0, True),
        (read.at - off, 1.0, True),
    ):
        clock._reading = replace(read, at=at, error_seconds=error_seconds)
        assert clock.is_wrong == is_wrong
