"""The management port, on real processes: metrics, probes, and their reports of faults."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from api.processes import _Child
from core.db.session import connect
from core.domain.errors import UnavailableError
from core.settings import TelemetrySettings
from core.telemetry.liveness import Liveness
from core.telemetry.management import ManagementServer
from core.telemetry.readiness import Need, Readiness
from local.ports import free_ports
from local.servers import ServerAddresses
from schedule.metrics import QueueCollector
from tests.databases import Database
from tests.factories.bases import POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant, add_tenant
from tests.processes import running_api
from tests.waiting import PATIENCE_SECONDS, wait_until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def ask(port: int | None, path: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=PATIENCE_SECONDS)


def scrape(port: int | None) -> Samples:
    families = text_string_to_metric_families(ask(port, "/metrics").text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


@contextmanager
def managed(liveness: Liveness, *needs: Need) -> Iterator[ManagementServer]:
    settings = TelemetrySettings.model_validate({"management_port": 0})
    server = ManagementServer(settings, readiness=Readiness(*needs), liveness=liveness, registry=CollectorRegistry())
    try:
        yield server
    finally:
        server.close()


def run_health(**env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "core.telemetry.health"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_without_a_setting_there_is_no_port() -> None:
    settings = TelemetrySettings.model_validate({"management_port": None})
    assert ManagementServer(settings, readiness=Readiness()).port is None


def test_a_probe_says_in_one_line_what_is_wrong() -> None:
    answers = threading.Event()

    def check() -> None:
        if not answers.is_set():
            raise UnavailableError("The database does not answer.")

    liveness = Liveness()
    with managed(liveness, Need("database", "database_unavailable", check)) as server:
        duty = liveness.add_duty("sweeping", patience_seconds=-1)
        assert (ask(server.port, "/livez").status_code, ask(server.port, "/readyz").status_code) == (503, 503)
        assert ask(server.port, "/livez").text.startswith("sweeping is overdue")
        assert ask(server.port, "/readyz").headers["retry-after"]
        duty.rest()
        answers.set()
        wait_until(lambda: ask(server.port, "/readyz").text == "ok\n")
        assert ask(server.port, "/livez").text == "ok: thread 'management', sweeping\n"
        assert ask(server.port, "/secrets").status_code == 404


def test_the_health_command_answers_with_its_exit_status() -> None:
    liveness = Liveness()
    with managed(liveness) as server:
        port = {"ESPALIER_MANAGEMENT_PORT": str(server.port)}
        assert run_health(**port).returncode == 0
        liveness.add_duty("sweeping", patience_seconds=-1)
        done = run_health(**port)
        assert done.returncode == 1
        assert done.stdout.startswith("sweeping is overdue")
    assert run_health(**port).returncode == 1
    assert run_health().stdout.startswith("ESPALIER_MANAGEMENT_PORT is not set")


def test_the_health_command_says_in_one_line_that_its_setting_is_wrong() -> None:
    done = run_health(ESPALIER_MANAGEMENT_PORT="many")
    (line,) = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (1, "")
    assert line.startswith("ESPALIER_MANAGEMENT_PORT (")


def test_an_api_process_whose_event_loop_hangs_is_named() -> None:
    class Process:
        pid = 17

    class Long:
        value = 1e-9  # after the machine's start

    fault = _Child(Process(), 0.0, Long()).find_fault()  # type: ignore[arg-type]
    assert str(fault).startswith("API process 17 is overdue")


def test_several_api_processes_are_counted_as_one(database: Database, servers: ServerAddresses, tenant: Tenant) -> None:
    port, management = free_ports(2)
    env = {"ESPALIER_MANAGEMENT_PORT": str(management), "ESPALIER_REDIS_URL": servers.redis_url}
    with running_api(database.api_url, servers.storage, port=port, num_processes=2, env=env) as group:
        url, keys = f"http://127.0.0.1:{port}", {"authorization": f"Bearer {tenant.api_key}"}

        def get(path: str, **headers: str) -> int:
            return httpx.get(url + path, headers=headers, trust_env=False, timeout=PATIENCE_SECONDS).status_code

        assert [get("/v1/models", **keys) for _ in range(20)] == [200] * 20
        assert {get(f"/no/such/{n}", **keys) for n in range(50)} == {404}
        assert {get(f"/v1/fine_tuning/jobs?limit={wrong}", **keys) for wrong in ("many", "-1", "1e9")} == {400}
        seen = scrape(management)
        models = {"method": "GET", "route": "/v1/models", "status": "2xx"}
        assert value(seen, "espalier_http_requests_total", **models) == 20
        assert value(seen, "espalier_http_answer_seconds_count", route="/v1/models") == 20
        unknown = {"method": "GET", "route": "unmatched", "status": "4xx"}
        assert value(seen, "espalier_http_requests_total", **unknown) == 50
        assert value(seen, "espalier_requests_refused_total", reason="unknown_url") == 50
        assert value(seen, "espalier_requests_refused_total", reason="invalid_request") == 3
        assert value(seen, "espalier_api_processes") == 2
        assert ask(management, "/livez").text.startswith("ok: ")
        assert ask(management, "/readyz").text == "ok\n"

        # A child that has died stays counted, and another takes its place.
        children = [each for each in psutil.Process(group.pid).children() if "spawn_main" in " ".join(each.cmdline())]
        wait_until(lambda: time_lived(children[0]) > 6)
        children[0].kill()
        wait_until(lambda: not children[0].is_running() or children[0].status() == psutil.STATUS_ZOMBIE)
        wait_until(lambda: value(scrape(management), "espalier_api_processes") == 2)
        assert value(scrape(management), "espalier_http_requests_total", **models) == 20


def time_lived(process: psutil.Process) -> float:
    """Return for how long a process has lived: the group ends with one that dies young."""
    return float(dt.datetime.now(dt.UTC).timestamp() - process.create_time())


def test_no_figure_grows_with_tenants(database: Database, servers: ServerAddresses, owner: Engine) -> None:
    port, management = free_ports(2)
    env = {"ESPALIER_MANAGEMENT_PORT": str(management), "ESPALIER_REDIS_URL": servers.redis_url}
    with running_api(database.api_url, servers.storage, port=port, env=env):
        sizes = []
        for num_tenants in (2, 40):
            for _ in range(num_tenants):
                keys = {"authorization": f"Bearer {add_tenant(owner).api_key}"}
                httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=keys, trust_env=False, timeout=PATIENCE_SECONDS)
            sizes.append(len(scrape(management)))
        assert sizes[0] == sizes[1]


def test_the_schedule_that_leads_shows_the_queue_of_a_thousand_tenants_in_few_lines(
    database: Database, owner: Engine
) -> None:
    for _ in range(3):
        queue_job(owner, add_tenant(owner))
    with owner.begin() as connection:
        connection.exec_driver_sql(THOUSAND_QUEUES)
    engine = connect(database.schedule_url)
    registry = CollectorRegistry()
    registry.register(QueueCollector(engine, is_leader=lambda: True))
    settings = TelemetrySettings.model_validate({"management_port": 0})
    server = ManagementServer(settings, readiness=Readiness(), liveness=Liveness(), registry=registry)
    seen = scrape(server.port)
    assert value(seen, "espalier_schedule_leads") == 1
    assert value(seen, "espalier_queue_jobs", pool=POOL, state="queued") >= 3
    assert value(seen, "espalier_queue_oldest_seconds", pool=POOL, state="queued") > 0
    assert value(seen, "espalier_queue_jobs", pool=POOL, state="running") == 0
    assert value(seen, "espalier_queue_claimable_jobs", pool=POOL) >= 3
    assert value(seen, "espalier_queue_claimable_oldest_seconds", pool=POOL) > 0
    assert value(seen, "espalier_pool_workers_wanted", pool=POOL) >= 1
    assert value(seen, "espalier_pool_workers", pool=POOL) == 0
    assert len(seen) < 30
    server.close()
    engine.dispose()


THOUSAND_QUEUES = """
with made as (
    insert into tenants (id, slug, name)
    select gen_random_uuid(), 'many-' || n, 'many' from generate_series(1, 1000) n returning id)
insert into queues (tenant_id, pool, num_queued, rank)
select id, (select pool from queues limit 1), 0, 0 from made on conflict do nothing
"""


def test_a_schedule_that_stands_by_shows_nothing_but_that(database: Database) -> None:
    engine = connect(database.schedule_url)
    registry = CollectorRegistry()
    registry.register(QueueCollector(engine, is_leader=lambda: False))
    assert [family.name for family in registry.collect()] == ["espalier_schedule_leads"]
    engine.dispose()
