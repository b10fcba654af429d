"""The service's own processes as tests start them, and the settings by which they find their servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO

import httpx
from sqlalchemy import Engine, select, text

from core.db.models import Leader
from core.db.session import service_transaction
from core.settings import StorageConfig
from local.servers import ServerAddresses
from tests.databases import Database
from tests.waiting import PATIENCE_SECONDS, wait_until


def storage_settings(storage: StorageConfig) -> dict[str, str]:
    """Return the settings of an object store that is opened by keys, as those of the local servers are."""
    assert storage.access_key is not None
    assert storage.secret_key is not None
    return {
        "ESPALIER_S3_ENDPOINT": storage.endpoint,
        "ESPALIER_S3_ACCESS_KEY": storage.access_key,
        "ESPALIER_S3_SECRET_KEY": storage.secret_key,
        "ESPALIER_S3_BUCKET": storage.bucket,
    }


@contextmanager
def running_api(
    database_url: str,
    storage: StorageConfig,
    *,
    port: int,
    num_processes: int = 1,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run an API on a port and wait until it is ready. In one process by default: some caps are a process's own."""
    env = {
        **os.environ,
        **(env or {}),
        **storage_settings(storage),
        "ESPALIER_DATABASE_URL": database_url,
        "ESPALIER_API_PORT": str(port),
        "ESPALIER_API_PROCESSES": str(num_processes),
        "ESPALIER_MAX_FILE_BYTES": str(300 * 2**20),
    }
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, "-m", "api"], env=env) as process:
        try:
            wait_until(lambda: _is_ready(url) or process.poll() is not None, what="the API")
            assert process.poll() is None, "the API has ended"
            yield process
        finally:
            process.terminate()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False, timeout=PATIENCE_SECONDS).is_success
    except httpx.TransportError:
        return False


@contextmanager
def schedule_process(
    database: Database,
    servers: ServerAddresses,
    *,
    env: Mapping[str, str] | None = None,
    log: int | IO[bytes] = subprocess.DEVNULL,
    **settings: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a schedule, which is killed at the end. `settings` are named as the schedule's own."""
    environment = {
        **os.environ,
        **storage_settings(servers.storage),
        "ESPALIER_DATABASE_URL": database.schedule_url,
        "ESPALIER_REDIS_URL": servers.redis_url.rpartition("/")[0] + "/7",
        **{f"ESPALIER_{name.upper()}": value for name, value in settings.items()},
        **{name.upper(): value for name, value in (env or {}).items()},
    }
    with subprocess.Popen([sys.executable, "-m", "schedule"], env=environment, stderr=log) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def leader_pid(owner: Engine) -> int | None:
    """Return the process that leads the schedules now, by the database's clock."""
    with service_transaction(owner) as session:
        holder = session.scalar(select(Leader.holder).where(Leader.lease_until > text("now()")))
    return int(holder.split(":")[1]) if holder else None
