"""A worker's supervisor in the test's own process, with a real trainer behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.db.clock import DatabaseClock
from core.db.session import connect
from core.settings import WorkerSettings
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.bases import POOL
from worker.supervisor.runner import Runner


def worker_settings(database: Database, servers: ServerAddresses, directory: Path, **changes: Any) -> WorkerSettings:
    """Return the settings of a worker named `w` that serves one pool and keeps its files below a directory."""
    storage = servers.storage
    values = {
        "database_url": database.worker_url,
        "redis_url": servers.redis_url,
        "s3_endpoint": storage.endpoint,
        "s3_access_key": storage.access_key,
        "s3_secret_key": storage.secret_key,
        "s3_bucket": storage.bucket,
        "worker_name": "w",
        "worker_pools": (POOL,),
        "cache_dir": directory / "cache",
        "trainer_threads": 1,
    }
    return WorkerSettings.model_validate(values | changes)


@contextmanager
def running_runner(settings: WorkerSettings) -> Iterator[Runner]:
    """Yield a runner, which is stopped and waited for at the end."""
    url = settings.database_url.get_secret_value()
    engines = [connect(url, pool_size=2), connect(url, pool_size=1)]
    clock = DatabaseClock(engines[0])
    store = S3ObjectStore(settings.storage_config, now=clock.now)
    made = Runner(settings, engine=engines[0], heartbeat_engine=engines[1], store=store, clock=clock)
    try:
        yield made
    finally:
        made.request_stop()
        made.wait_until_idle()
        made.close()
        for engine in engines:
            engine.dispose()
