"""Operators' view of jobs, workers, pools and usage over HTTP, page by page, without any tenant's words."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text

from core.db.session import connect, operator_transaction, service_transaction
from core.domain.workers import WorkerFacts
from core.services import attempts
from core.services.operators import issue_operator_key
from core.services.workers import record_worker
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.databases import Database, run
from tests.factories.bases import BASE_MODEL, NF4_POOL, POOL
from tests.factories.jobs import claim, queue_job
from tests.factories.tenants import Tenant, add_tenant
from tests.integration.api.clients import good, http
from tests.integration.api.planting import plant


@pytest.fixture
def admin(api_url: str, owner: Engine) -> Iterator[httpx.Client]:
    with operator_transaction(owner, actor="test") as session:
        key = str(issue_operator_key(session, name="olga"))
    with http(api_url, key) as client:
        yield client


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    """The worker's role, and no job, worker or use of another test."""
    run(owner, "truncate jobs, queues, usage, workers cascade")
    return worker


def pages_of(admin: httpx.Client, path: str, **params: Any) -> list[dict[str, Any]]:
    """Return all that a list holds, read two at a time."""
    found: list[dict[str, Any]] = []
    while True:
        page = good(admin.get(path, params={**params, "limit": 2, **({"after": found[-1]["id"]} if found else {})}))
        found += page["data"]
        assert len(page["data"]) == 2 or not page["has_more"]
        if not page["has_more"]:
            return found


def test_jobs_of_everybody_are_listed_newest_first_and_filtered_page_by_page(
    admin: httpx.Client, worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    for number in range(7):
        queue_job(owner, (tenant, other_tenant)[number % 2], quantization="nf4" if number % 3 == 0 else None)
    lease = claim(worker)
    assert lease is not None
    jobs = pages_of(admin, "/admin/jobs")
    assert [job["id"] for job in jobs] == sorted((job["id"] for job in jobs), reverse=True)
    assert len(jobs) == 7
    keys = {
        "status": ("queued", "running", "failed"),
        "pool": (POOL, NF4_POOL),
        "tenant": (tenant.slug, other_tenant.slug),
    }
    for name, values in keys.items():
        for value in values:
            assert pages_of(admin, "/admin/jobs", **{name: value}) == [job for job in jobs if job[name] == value]
    both = {"status": "queued", "pool": POOL, "tenant": tenant.slug}
    assert pages_of(admin, "/admin/jobs", **both) == [
        job for job in jobs if all(job[name] == value for name, value in both.items())
    ]
    (running,) = pages_of(admin, "/admin/jobs", status="running")
    assert (running["id"], running["worker"], running["attempts"]) == (f"ftjob-{lease.job_id.hex}", "w", 1)
    run(owner, "update jobs set pause_requested_at = now() where status = 'running'")
    (pausing,) = pages_of(admin, "/admin/jobs", status="running")
    assert (running["is_pausing"], pausing["is_pausing"]) == (False, True)


def test_filters_that_nothing_can_fit_are_refused_or_answered_with_nothing(admin: httpx.Client) -> None:
    assert admin.get("/admin/jobs", params={"status": "asleep"}).status_code == 400
    assert admin.get("/admin/jobs", params={"tenant": "nobody-here"}).status_code == 404
    assert admin.get("/admin/jobs", params={"after": "ftjob-1"}).status_code == 404
    assert good(admin.get("/admin/jobs", params={"pool": "none-such"}))["data"] == []
    for path in ("/admin/jobs", "/admin/workers", "/admin/pools", "/admin/usage"):
        assert admin.get(path, params={"limit": 1001}).status_code == 400


def test_a_worker_is_shown_with_what_it_holds_and_as_gone_when_it_is_silent(
    admin: httpx.Client, worker: Engine
) -> None:
    busy = WorkerFacts("gpu-1:7:ab", (POOL, NF4_POOL), "serving", POOL, 8, 3, version="0.1.0+abc", given_name="gpu-1")
    wrong = WorkerFacts(
        "gpu-4", (NF4_POOL,), "serving", NF4_POOL, 8, 1, clock_offset_seconds=-1200.5, is_clock_wrong=True
    )
    with service_transaction(worker) as session:
        record_worker(session, busy, alive_seconds=60, is_start=True)
        record_worker(session, WorkerFacts("gpu-2", (NF4_POOL,), "stopping"), alive_seconds=60, is_start=True)
        record_worker(session, WorkerFacts("gpu-3", (NF4_POOL,), "idle"), alive_seconds=-1, is_start=True)
        record_worker(session, wrong, alive_seconds=60, is_start=True)
    shown = pages_of(admin, "/admin/workers")
    assert [(each["id"], each["is_alive"], each["is_draining"]) for each in shown] == [
        ("gpu-1:7:ab", True, False),
        ("gpu-2", True, True),
        ("gpu-3", False, False),
        ("gpu-4", True, False),
    ]
    assert (shown[3]["name"], shown[3]["state"], shown[3]["clock_offset_seconds"]) == ("gpu-4", "clock_wrong", -1200.5)
    assert shown[0] | {"started_at": 0, "heartbeat_at": 0} == {
        "id": "gpu-1:7:ab",
        "object": "worker",
        "name": "gpu-1",
        "clock_offset_seconds": None,
        "version": "0.1.0+abc",
        "state": "serving",
        "is_alive": True,
        "is_draining": False,
        "pools": [POOL, NF4_POOL],
        "pool": POOL,
        "next_pool": None,
        "slots": 8,
        "slots_in_use": 3,
        "refusals": {},
        "started_at": 0,
        "heartbeat_at": 0,
    }


def test_a_pool_is_shown_with_its_queue_its_workers_and_its_base(
    admin: httpx.Client, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    for _ in range(3):
        queue_job(owner, tenant)
    run(
        owner,
        "update jobs set created_at = now() - interval '90 seconds' where id = (select min(id::text)::uuid from jobs)",
    )
    run(owner, "update tenants set max_running = 2 where id = :id", id=tenant.id)
    with service_transaction(worker) as session:
        serving = WorkerFacts(
            "gpu-1", (POOL, NF4_POOL), "serving", POOL, slots=8, slots_in_use=1, refusals={NF4_POOL: "No."}
        )
        record_worker(session, serving, alive_seconds=60, is_start=True)
        record_worker(session, WorkerFacts("gpu-2", (POOL,), "stopping"), alive_seconds=60, is_start=True)
    nf4, none = pages_of(admin, "/admin/pools")
    assert (nf4["id"], nf4["num_workers"], nf4["num_refusing"], nf4["oldest_queued_seconds"]) == (NF4_POOL, 1, 1, None)
    wanted = {"num_queued": 3, "num_claimable": 2, "num_running": 0, "num_slots": 8, "workers_wanted": 1}
    served = {"num_workers": 1, "num_holding": 1, "num_refusing": 0, "slots_in_use": 1, "is_offered": True}
    assert none | {"id": POOL, "base_model": BASE_MODEL, "quantization": None} | wanted | served == none
    assert 90 <= none["oldest_queued_seconds"] < 900
    demand = good(admin.get(f"/admin/pools/{POOL}/demand"))
    assert demand == {"id": POOL, "object": "pool.demand"} | {
        name: wanted[name] for name in wanted if name != "num_queued"
    }
    assert admin.get("/admin/pools/none-such/demand").json()["error"]["code"] == "pool_not_found"


def use(worker: Engine, gpu_seconds: float, tokens: int) -> None:
    """Claim a job and end it as preempted after so much use."""
    lease = claim(worker)
    assert lease is not None
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, lease)
        session.execute(
            text("""insert into usage (id, tenant_id, attempt_id, gpu_seconds, trained_tokens)
                select uuidv7(), tenant_id, id, :gpu_seconds, :tokens from attempts where lease_token = :token"""),
            {"gpu_seconds": gpu_seconds, "tokens": tokens, "token": lease.token},
        )


def test_use_is_summed_by_tenant_pool_or_day_as_json_and_as_csv(
    admin: httpx.Client, worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    use(worker, 10, 100)
    run(owner, "update usage set created_at = '2026-03-01 23:59:59.5+00'")
    use(worker, 5, 50)
    run(owner, "update usage set created_at = '2026-03-02 00:00:00+00' where gpu_seconds = 5")
    run(owner, "update jobs set status = 'paused'")
    queue_job(owner, other_tenant)
    use(worker, 2.5, 25)
    run(owner, "update usage set created_at = '2026-03-02 12:00:00+00' where gpu_seconds = 2.5")
    period = {"from": "2026-03-01", "to": "2026-03-02"}

    def sums(**params: str) -> list[tuple[Any, ...]]:
        rows = good(admin.get("/admin/usage", params={**period, **params}))["data"]
        return [
            (row["id"], row["gpu_seconds"], row["trained_tokens"], row["num_jobs"], row["num_attempts"]) for row in rows
        ]

    by_tenant = sorted([(tenant.slug, 15, 150, 1, 2), (other_tenant.slug, 2.5, 25, 1, 1)])
    assert sums() == sums(group_by="tenant") == by_tenant
    assert sums(group_by="pool") == [(POOL, 17.5, 175, 2, 3)]
    assert sums(group_by="day") == [("2026-03-01", 10, 100, 1, 1), ("2026-03-02", 7.5, 75, 2, 2)]
    assert sums(group_by="day", to="2026-03-01") == [("2026-03-01", 10, 100, 1, 1)]
    assert [row["id"] for row in pages_of(admin, "/admin/usage", **period)] == [row[0] for row in by_tenant]
    asked = admin.get("/admin/usage", params={**period, "format": "csv"})
    accepted = admin.get("/admin/usage", params=period, headers={"accept": "text/csv"})
    assert asked.headers["content-type"] == "text/csv; charset=utf-8"
    assert asked.text == accepted.text
    table = list(csv.reader(io.StringIO(asked.text)))
    assert table[0] == ["tenant", "gpu_seconds", "trained_tokens", "num_jobs", "num_attempts"]
    assert [(row[0], float(row[1]), *map(int, row[2:])) for row in table[1:]] == by_tenant


def test_a_period_that_cannot_be_is_refused(admin: httpx.Client) -> None:
    for wrong in (
        {"from": "2026-03-02", "to": "2026-03-01"},
        {"from": "2025-01-01", "to": "2026-03-01"},
        {"from": "yesterday"},
        {"group_by": "file"},
        {"format": "xml"},
    ):
        assert admin.get("/admin/usage", params=wrong).status_code == 400, wrong
    assert good(admin.get("/admin/usage", params={"from": "9999-12-31", "to": "9999-12-31"}))["data"] == []


@pytest.mark.usefixtures("worker")
def test_nothing_of_a_tenants_own_is_in_any_list_of_operators(
    admin: httpx.Client, database: Database, servers: ServerAddresses, owner: Engine
) -> None:
    tenant = add_tenant(owner)
    api = connect(database.api_url)
    planted = plant(owner, api, S3ObjectStore(servers.storage), tenant)
    api.dispose()
    run(
        owner,
        """update jobs set suffix = 'blossom', metadata = '{"private": "words"}',
        error = '{"code": "diverged", "message": "blossom"}', status = 'failed', fine_tuned_model = null
        where status = 'succeeded'""",
    )
    for path in ("/admin/jobs", "/admin/workers", "/admin/pools", "/admin/usage"):
        told = json.dumps(good(admin.get(path)))
        for secret in ("blossom", "private", "words", "a.jsonl", planted.file, "Planted"):
            assert secret not in told, path
    assert [job["error_code"] for job in pages_of(admin, "/admin/jobs", status="failed")] == ["diverged"]
