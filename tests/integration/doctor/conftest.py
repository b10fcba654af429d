"""Servers of their own for the tests of the doctor, and the doctor's findings by check."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from cli.main import app
from core.db.session import connect, service_transaction
from core.domain.bases import Registry
from core.domain.workers import WorkerFacts
from core.services.leadership import lead, resign
from core.services.workers import forget_worker, record_worker
from core.storage import S3ObjectStore
from core.version import read_version
from local.servers import LocalServers, ServerAddresses
from local.stack import prepare_database
from tests.databases import LOGINS
from tests.factories.bases import make_entry
from tests.integration.doctor.examining import POOLS, Examine
from tests.processes import storage_settings


@pytest.fixture(scope="package")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerAddresses]:
    """Servers that no other test uses: what is broken here is broken for nobody else."""
    with LocalServers(tmp_path_factory.mktemp("own"), is_durable=False) as servers:
        entry = make_entry(Path("/nowhere"))
        prepare_database(servers.addresses.postgres_url, Registry(base_models=(entry,)), logins=LOGINS)
        S3ObjectStore(servers.addresses.storage).ensure_bucket()
        yield servers.addresses


@pytest.fixture(scope="package")
def owner(own: ServerAddresses) -> Iterator[Engine]:
    engine = connect(own.postgres_url)
    yield engine
    engine.dispose()


@pytest.fixture(autouse=True)
def _one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_COMMIT", "0123456789ab")


@pytest.fixture
def env(own: ServerAddresses) -> dict[str, str]:
    return {
        "ESPALIER_OWNER_DATABASE_URL": own.postgres_url,
        "ESPALIER_REDIS_URL": own.redis_url,
        **storage_settings(own.storage),
    }


@pytest.fixture
def examine(env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Run the doctor, and return what it found by check. Without the word of a GPU that this machine may have."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def run(*words: str, **changes: str | None) -> dict[str, dict[str, Any]]:
        argv = ["doctor", "--data-dir", str(tmp_path), "--json", *words]
        done = CliRunner().invoke(app, argv, env={**env, **changes}, catch_exceptions=False)
        found = {each["check"]: each for each in map(json.loads, done.stdout.splitlines())}
        assert done.exit_code == int(any(each["state"] == "failed" for each in found.values()))
        assert all(each["remedy"] for each in found.values() if each["state"] in ("failed", "warning"))
        return found

    return run


@pytest.fixture
def serving(owner: Engine) -> Iterator[None]:
    """A schedule that leads, a worker of this version that serves every pool, and a base that has been loaded."""
    with service_transaction(owner) as session:
        lead(session, "schedule-1", lease_seconds=600)
        facts = WorkerFacts("gpu-1", POOLS, "idle", version=str(read_version()))
        record_worker(session, facts, alive_seconds=600, is_start=True)
        session.execute(text("update base_models set state = 'usable', state_reason = null"))
    yield
    with service_transaction(owner) as session:
        resign(session, "schedule-1")
        forget_worker(session, "gpu-1")
