"""Behind PgBouncer, in session and in transaction mode, everything works as without it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from openai import OpenAI
from sqlalchemy import Engine, text

from core.database_urls import with_login
from core.db.session import connect, service_transaction, tenant_transaction
from core.domain.leases import Lease
from core.services import claims, leases
from local.ports import free_ports
from local.privileges import drop_root
from local.processes import ChildProcess, ProcessSpec
from local.servers import ServerAddresses
from tests.clusters import PASSWORD
from tests.databases import Database
from tests.deploy.packages import NotInstalledError, ensure_programs
from tests.factories.bases import BASE_MODEL
from tests.factories.jobs import fail_job, record_step
from tests.factories.tenants import Tenant
from tests.faults import port_of, with_port
from tests.processes import running_api
from tests.waiting import PATIENCE_SECONDS

_NUM_SESSIONS = 2  # of PostgreSQL's, which all clients share
PATIENCE = f"{PATIENCE_SECONDS / 60:.0f}min"  # as PostgreSQL shows it
_ROLES = ("espalier_api", "espalier_worker", "espalier_schedule")


@dataclass(frozen=True)
class Pooler:
    """A running PgBouncer. Its clients' URLs say which mode it is in."""

    mode: str
    port: int

    def url(self, role: str, database: Database) -> str:
        direct = with_login(database.owner_url, user=role, password=PASSWORD)
        return f"{with_port(direct, self.port)}?pooler={self.mode}"


@pytest.fixture(scope="module", params=["session", "transaction"])
def pooler(
    request: pytest.FixtureRequest, servers: ServerAddresses, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pooler]:
    try:
        ensure_programs(("pgbouncer",), packages=("pgbouncer",))
    except NotInstalledError as error:
        pytest.skip(str(error))
    directory: Path = tmp_path_factory.mktemp("pooler") / "own"
    directory.mkdir(mode=0o700)
    prefix, (port,) = drop_root(directory), free_ports(1)
    users = directory / "users.txt"
    users.write_text("".join(f'"{role}" "{PASSWORD}"\n' for role in _ROLES))
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "scram-sha-256",
        "auth_file": users,
        "pool_mode": request.param,
        "default_pool_size": _NUM_SESSIONS if request.param == "transaction" else 60,
        "max_client_conn": 200,
    }
    written = "\n".join(f"{name} = {value}" for name, value in settings.items())
    config = directory / "pgbouncer.ini"
    config.write_text(f"[databases]\n* = host=127.0.0.1 port={port_of(servers.postgres_url)}\n[pgbouncer]\n{written}\n")
    owner = directory.stat()
    for path in (users, config):
        os.chown(path, owner.st_uid, owner.st_gid)
    child = ChildProcess(ProcessSpec("pgbouncer", ["pgbouncer", str(config)], prefix=prefix), directory.parent / "logs")
    try:
        child.wait_until(lambda: _listens(port), timeout_seconds=PATIENCE_SECONDS)
        yield Pooler(request.param, port)
    finally:
        child.stop()


def _listens(port: int) -> bool:
    try:
        psycopg.connect(f"postgresql://nobody@127.0.0.1:{port}/nothing").close()
    except psycopg.OperationalError as error:
        return "refused" not in str(error)
    return True


@pytest.fixture
def worker(pooler: Pooler, database: Database) -> Iterator[Engine]:
    engine = connect(pooler.url("espalier_worker", database))
    yield engine
    engine.dispose()


def test_a_job_is_submitted_trained_and_ended_through_a_pooler(
    pooler: Pooler, database: Database, servers: ServerAddresses, worker: Engine, tenant: Tenant
) -> None:
    (port,) = free_ports(1)
    with (
        running_api(pooler.url("espalier_api", database), servers.storage, port=port),
        OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=tenant.api_key, max_retries=0) as client,
    ):
        row = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        file = client.files.create(file=("rows.jsonl", row * 12), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file.id)
        with service_transaction(worker) as session:
            claimed = claims.claim_job(session, f"{BASE_MODEL}@none", worker_name="w", lease_seconds=60)
        assert claimed is not None
        assert claimed.lease_token is not None
        lease = Lease(claimed.id, claimed.tenant_id, claimed.lease_token)
        for step in range(1, 12):  # often enough for a statement to be prepared, where any is
            record_step(worker, lease, step)
            with service_transaction(worker) as session:
                leases.heartbeat(session, lease, lease_seconds=60)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
        fail_job(worker, lease)
        assert client.fine_tuning.jobs.retrieve(job.id).status in ("failed", "queued")
        assert len(client.fine_tuning.jobs.list_events(job.id).data) > 1


def test_identities_and_bounds_do_not_pass_from_one_client_to_another(
    pooler: Pooler, database: Database, tenant: Tenant, other_tenant: Tenant
) -> None:
    """Many threads share few sessions: each transaction sees its own tenant, and one without a tenant sees none."""
    engine = connect(pooler.url("espalier_api", database), pool_size=10, lock_timeout_seconds=PATIENCE_SECONDS)
    seen = text(
        "select current_setting('app.tenant_id', true), current_setting('lock_timeout'), count(*) from api_keys"
    )

    def ask(tenant_id: uuid.UUID) -> None:
        with tenant_transaction(engine, tenant_id) as session:
            assert session.execute(seen).one() == (str(tenant_id), PATIENCE, 1)
        with service_transaction(engine) as session:
            assert session.execute(seen).one() == ("", PATIENCE, 0)

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(ask, [tenant.id, other_tenant.id] * 100))
    engine.dispose()
