"""A real runner with real trainers, and a tiny base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from core.db.clock import DatabaseClock
from core.db.session import connect, service_transaction
from core.settings import WorkerSettings
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.bases import NF4_POOL, POOL
from tests.factories.tiny_bases import write_tiny_base
from tests.supervisors import worker_settings
from worker.supervisor.runner import Runner


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def settings(database: Database, servers: ServerAddresses, tmp_path: Path) -> WorkerSettings:
    return worker_settings(database, servers, tmp_path, worker_name="tried", worker_pools=(POOL, NF4_POOL))


@pytest.fixture
def start(servers: ServerAddresses, owner: Engine) -> Iterator[Callable[[WorkerSettings], Runner]]:
    """Make runners, and see to it that no job or trainer is left to the next test."""
    made: list[Runner] = []

    def make(settings: WorkerSettings) -> Runner:
        url = settings.database_url.get_secret_value()
        engine, store = connect(url), S3ObjectStore(servers.storage)
        clock = DatabaseClock(engine)
        made.append(Runner(settings, engine=engine, heartbeat_engine=connect(url), store=store, clock=clock))
        return made[-1]

    yield make
    for runner in made:
        runner.request_stop()
        runner.close()
    with service_transaction(owner) as session:
        session.connection().exec_driver_sql("delete from workers")
        session.connection().exec_driver_sql(
            "update jobs set status = 'cancelled', finished_at = now(), lease_token = null, lease_until = null "
            "where status in ('queued', 'running')"
        )
