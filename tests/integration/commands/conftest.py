"""The command line on real servers, and a tenant with rows in every table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from typer.testing import CliRunner, Result

from cli.main import app
from core.db.session import service_transaction
from core.domain.workers import WorkerFacts
from core.services.workers import record_worker
from local.servers import ServerAddresses
from tests.databases import Database, run
from tests.factories.bases import POOL
from tests.factories.jobs import claim, queue_job
from tests.factories.tenants import Tenant, add_tenant
from tests.integration.commands.invocations import LONG, Espalier
from tests.processes import storage_settings


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    """The worker's role on a queue that is empty of other tests' jobs, and a base that may be used."""
    run(owner, "truncate jobs, queues, set_asides cascade")
    run(owner, "update base_models set state = 'usable', state_reason = null, slots = 8")
    return worker


@pytest.fixture
def env(database: Database, servers: ServerAddresses) -> dict[str, str]:
    return {
        "ESPALIER_OWNER_DATABASE_URL": database.owner_url,
        "ESPALIER_DATABASE_URL": database.api_url,
        "ESPALIER_REDIS_URL": servers.redis_url,
        **storage_settings(servers.storage),
    }


@pytest.fixture
def espalier(env: dict[str, str]) -> Espalier:
    def run(*words: str | Path) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words], env=env, catch_exceptions=False)

    return run


@pytest.fixture
def busy(worker: Engine, owner: Engine) -> Tenant:
    """A tenant with a long slug, jobs that wait and run, a worker that serves and one that is gone."""
    tenant = add_tenant(owner)
    slug = tenant.slug + "-" + "x" * (31 - len(tenant.slug))
    run(owner, "update tenants set slug = :slug where id = :id", slug=slug, id=tenant.id)
    run(owner, "truncate workers")
    for _ in range(3):
        queue_job(owner, tenant)
    assert claim(worker) is not None
    with service_transaction(worker) as session:
        serving = WorkerFacts(
            "gpu-node-17.cluster.internal-0",
            (LONG, POOL),
            "serving",
            LONG,
            8,
            3,
            next_pool=POOL,
            version="0.1.0+0123456789ab",
        )
        record_worker(session, serving, alive_seconds=60, is_start=True)
        record_worker(session, WorkerFacts("gone", (POOL,), "idle"), alive_seconds=-1, is_start=True)
    return Tenant(tenant.id, slug, tenant.api_key, tenant.key_id)


@pytest.fixture(autouse=True)
def _no_marks_of_rich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_COLOR", "1")
    yield
