"""All checks pass on a sound deployment. A missing schedule and an unfit worker are found."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from core.db.migrate import login_url
from core.db.session import service_transaction
from core.domain.workers import WorkerFacts
from core.services.workers import record_worker
from core.storage import S3ObjectStore
from local.ports import free_ports
from local.servers import ServerAddresses
from tests.databases import LOGINS
from tests.factories.jobs import queue_job
from tests.factories.tenants import add_tenant
from tests.integration.doctor.examining import POOLS, Examine, run
from tests.processes import running_api


@pytest.mark.usefixtures("serving")
def test_a_deployment_that_is_well_is_found_well(examine: Examine, own: ServerAddresses) -> None:
    (port,) = free_ports(1)
    api_url = login_url(own.postgres_url, LOGINS[0])
    with running_api(api_url, own.storage, port=port):
        found = examine("--api-url", f"http://127.0.0.1:{port}")
    assert {check: each["state"] for check, each in found.items()} == dict.fromkeys(
        [
            "version",
            "redis",
            "storage put",
            "storage get",
            "storage link",
            "storage delete",
            "api",
            "database",
            "schema",
            *("roles", "grants", "operator", "clock", "schedule", "workers", "bases"),
        ],
        "ok",
    ) | {"gpu": "skipped"}
    left = list(S3ObjectStore(own.storage).list_keys("tenants/"))
    assert not [object_key for object_key in left if "/doctor/" in object_key]


@pytest.mark.usefixtures("serving")
def test_the_apis_own_role_can_look_at_all_of_it(examine: Examine, own: ServerAddresses) -> None:
    url = login_url(own.postgres_url, LOGINS[0])
    found = examine(ESPALIER_OWNER_DATABASE_URL=None, ESPALIER_DATABASE_URL=url)
    assert {each["state"] for check, each in found.items() if check not in ("gpu", "api")} == {"ok"}
    found = examine(ESPALIER_OWNER_DATABASE_URL=None, ESPALIER_DATABASE_URL=login_url(own.postgres_url, LOGINS[1]))
    assert {check for check, each in found.items() if each["state"] == "failed"} == set()
    assert found["operator"]["state"] == found["workers"]["state"] == "skipped"


def test_nobody_who_leads_and_nobody_who_works_are_found(examine: Examine, owner: Engine) -> None:
    run(owner, "delete from leaders", "truncate jobs, queues cascade")
    found = examine()
    assert found["schedule"] | {"state": "failed", "says": "No schedule has ever led."} == found["schedule"]
    assert found["workers"]["state"] == "warning"
    queue_job(owner, add_tenant(owner))
    found = examine()
    assert (found["workers"]["state"], found["workers"]["says"]) == ("failed", "No worker is alive; 1 jobs are queued.")
    run(owner, "truncate jobs, queues cascade")


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (WorkerFacts("gpu-1", POOLS, "idle", refusals={POOLS[1]: "Too little memory."}), "Too little memory."),
        (WorkerFacts("gpu-1", POOLS[:1], "idle"), f"none of them serves {POOLS[1]}"),
        (WorkerFacts("gpu-1", POOLS, "idle", version="0.0.1"), "gpu-1 runs another version"),
    ],
)
def test_a_worker_that_does_not_do_all_it_should_is_found(
    examine: Examine, owner: Engine, facts: WorkerFacts, told: str
) -> None:
    with service_transaction(owner) as session:
        record_worker(session, facts, alive_seconds=600, is_start=False)
    found = examine()["workers"]
    assert (found["state"], told in found["says"]) == ("warning", True), found


@pytest.mark.parametrize(
    ("script", "state", "told"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4'", "failed", "driver 570.86.15"),
        ("echo 'NVIDIA H100 80GB HBM3, 580.95.05, 81559, 4'", None, "4 of 81559 MiB used"),
        ("exit 9", "failed", "nvidia-smi does not answer"),
        ("true", "failed", "no GPU"),
    ],
)
def test_a_device_that_cannot_be_used_is_found(
    examine: Examine, tmp_path: Path, script: str, state: str | None, told: str
) -> None:
    """With a program that says what NVIDIA's says on such a host: there is none here."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    found = examine()["gpu"]
    assert found["state"] in ((state,) if state else ("ok", "failed"))  # as torch's build here is
    assert told in found["says"]
