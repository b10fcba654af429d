"""A supervisor with a real trainer whose surroundings fail: which failures it survives, and which end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

from core.db.session import service_transaction
from core.queue import WakeUpPublisher
from core.services.set_asides import list_set_asides
from core.settings import StorageConfig, WorkerSettings
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.bases import POOL
from tests.factories.jobs import queue_trainable_job
from tests.factories.tenants import Tenant
from tests.factories.tiny_bases import write_tiny_base
from tests.processes import storage_settings
from tests.sessions import any_role_transaction
from tests.supervisors import running_runner, worker_settings
from tests.waiting import PATIENCE_SECONDS, wait_until


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _emptied(owner: Engine, base: Path) -> None:
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs, queues, workers, set_asides cascade"))
        source = json.dumps({"kind": "path", "location": str(base), "revision": ""})
        session.execute(text("update base_models set source = cast(:source as jsonb)"), {"source": source})


def ask(owner: Engine, question: str, job_id: object) -> Any:
    with service_transaction(owner) as session:
        return session.scalars(text(question), {"id": job_id}).one_or_none()


def status_of(owner: Engine, job_id: object) -> tuple[str, int, int]:
    """Return a job's status, the attempts it was charged, and those it had."""
    question = """
        select status, attempt_count, (select count(*) from attempts where job_id = jobs.id) from jobs where id = :id
    """
    with service_transaction(owner) as session:
        status, num_charged, num_had = session.execute(text(question), {"id": job_id}).one()
    return status, num_charged, num_had


def has_stepped(owner: Engine, job_id: object) -> bool:
    return bool(ask(owner, "select 1 from metrics where job_id = :id limit 1", job_id))


@dataclass
class Role:
    """A role's keys, good for one request each, as a container is given them; none while `is_away`."""

    storage: StorageConfig
    is_away: bool = False
    num_refused: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self) -> str:
        with self.lock:
            self.num_refused += self.is_away
        keys = {"AccessKeyId": self.storage.access_key, "SecretAccessKey": self.storage.secret_key, "Token": ""}
        return "away" if self.is_away else json.dumps(keys | {"Expiration": "2020-01-01T00:00:00Z"})


@pytest.fixture
def role(servers: ServerAddresses, monkeypatch: pytest.MonkeyPatch) -> Iterator[Role]:
    made = Role(servers.storage)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = made.answer().encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.server_port}/role")
        yield made
        server.shutdown()
        thread.join()


def settings_of(database: Database, servers: ServerAddresses, directory: Path, **changes: Any) -> WorkerSettings:
    return worker_settings(database, servers, directory, scratch_dir=directory, heartbeat_seconds=0.2, **changes)


def test_a_worker_whose_role_has_no_keys_for_a_while_keeps_its_jobs_and_charges_nobody(
    database: Database, servers: ServerAddresses, owner: Engine, tenant: Tenant, role: Role, tmp_path: Path
) -> None:
    held = queue_trainable_job(owner, servers, tenant)
    keyless = {"s3_access_key": None, "s3_secret_key": None}
    with running_runner(settings_of(database, servers, tmp_path, resume_steps=5, **keyless)) as runner:
        serving = threading.Thread(target=runner.serve)
        serving.start()
        wait_until(lambda: has_stepped(owner, held))
        role.is_away = True
        waiting = queue_trainable_job(owner, servers, tenant)
        wait_until(lambda: role.num_refused > 0 and bool(runner._round._reports._ungranted), what="a question for URLs")
        step = ask(owner, "select max(step) from metrics where job_id = :id", held)
        newer = f"select 1 from metrics where job_id = :id and step > {step} limit 1"
        wait_until(lambda: bool(ask(owner, newer, held)), what="a step that is recorded meanwhile")
        assert serving.is_alive()
        assert runner.is_turning
        assert status_of(owner, waiting) == ("queued", 0, 0)
        role.is_away = False
        serving.join(PATIENCE_SECONDS)
        assert not serving.is_alive()
    for job_id in (held, waiting):
        assert status_of(owner, job_id) == ("succeeded", 1, 1)
    with any_role_transaction(owner) as session:
        assert list_set_asides(session) == []


@contextmanager
def without_table(owner: Engine, table: str) -> Iterator[None]:
    """Take away a table within the block: an error that nobody expects."""
    with owner.begin() as connection:
        connection.execute(text(f"alter table {table} rename to gone"))
    try:
        yield
    finally:
        with owner.begin() as connection:
            connection.execute(text(f"alter table gone rename to {table}"))


def test_a_worker_that_holds_jobs_which_nobody_serves_is_not_sound(
    database: Database, servers: ServerAddresses, owner: Engine, tenant: Tenant, tmp_path: Path
) -> None:
    job_id = queue_trainable_job(owner, servers, tenant)
    errors: list[Exception] = []
    with running_runner(settings_of(database, servers, tmp_path)) as runner:

        def serve() -> None:
            with pytest.raises(ProgrammingError) as caught:
                runner.serve()
            errors.append(caught.value)

        serving = threading.Thread(target=serve)
        serving.start()
        wait_until(lambda: has_stepped(owner, job_id))
        was_turning = runner.is_turning
        assert was_turning
        with without_table(owner, "metrics"):
            serving.join(PATIENCE_SECONDS)
        assert len(errors) == 1
        assert not runner.is_turning
        for held in runner._round.jobs:
            runner._round.jobs._keeper.let_go(held.lease)  # the process that would end goes on


def test_a_worker_whose_task_meets_an_error_that_nobody_expects_ends_with_status_1(
    database: Database, servers: ServerAddresses, owner: Engine, tenant: Tenant, tmp_path: Path
) -> None:
    job_id = queue_trainable_job(owner, servers, tenant)
    storage, log = servers.storage, tmp_path / "log"
    env = {
        "ESPALIER_DATABASE_URL": database.worker_url,
        "ESPALIER_REDIS_URL": servers.redis_url,
        **storage_settings(storage),
        "ESPALIER_WORKER_NAME": f"w-{uuid.uuid4()}",
        "ESPALIER_WORKER_POOLS": json.dumps([POOL]),
        "ESPALIER_CACHE_DIR": str(tmp_path / "cache"),
        "ESPALIER_SCRATCH_DIR": str(tmp_path),
        "ESPALIER_TRAINER_THREADS": "1",
        "ESPALIER_DEAF_SECONDS": "3600",  # it is its task that serves
        "ESPALIER_MANAGEMENT_PORT": "0",
    }
    with (
        WakeUpPublisher(servers.redis_url) as publisher,
        log.open("wb") as stream,
        subprocess.Popen([sys.executable, "-m", "worker"], env={**os.environ, **env}, stderr=stream) as process,
    ):
        publisher.publish(POOL)
        try:
            wait_until(lambda: has_stepped(owner, job_id))
            with without_table(owner, "metrics"):
                assert process.wait(PATIENCE_SECONDS) == 1
        finally:
            process.kill()
    told = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert [line["thread"] for line in told if line["event"] == "thread.failed"] == ["serving"]
