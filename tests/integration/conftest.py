"""A separate migrated database for every test module, and an API process on it."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import psycopg
import pytest
from openai import OpenAI
from psycopg import sql
from sqlalchemy import Engine, text

from core.db.migrate import RoleLogin, login_url
from core.db.session import connect, service_transaction
from core.domain.api_keys import ALL_SCOPES
from core.domain.bases import BaseModelEntry, BaseModelSource, Registry
from core.services.api_keys import issue_api_key
from core.services.tenants import create_tenant
from core.settings import StorageConfig
from core.storage import S3ObjectStore
from local.ports import free_ports
from local.servers import ServerAddresses
from local.stack import prepare_database
from tests.clusters import OWNER, PASSWORD, make_owner
from tests.waiting import PATIENCE_SECONDS, wait_until

BASE_MODEL = "acme-labs/tiny-base"
LOGINS = tuple(RoleLogin(f"espalier_{name}", PASSWORD) for name in ("api", "worker", "schedule", "scaler"))


@dataclass(frozen=True)
class Database:
    """A migrated database: its owner's URL, its server's superuser's, and one URL a runtime role."""

    owner_url: str
    superuser_url: str
    api_url: str
    worker_url: str
    schedule_url: str
    scaler_url: str


@dataclass(frozen=True)
class Tenant:
    id: uuid.UUID
    slug: str
    api_key: str
    key_id: str


@pytest.fixture(scope="session")
def migrated(servers: ServerAddresses) -> str:
    """The name of a migrated database that nobody writes to; the modules' own are copies of it."""
    name = f"migrated_{uuid.uuid4().hex}"
    entry = BaseModelEntry(
        id=BASE_MODEL,
        source=BaseModelSource(kind="path", location="/nowhere"),
        quantizations=("nf4",),
        target_modules=("q_proj", "v_proj"),
        max_seq_len=256,
        max_rank=64,
    )
    create_database(servers, name)
    prepare_database(owner_url_of(servers, name), Registry(base_models=(entry,)), logins=LOGINS)
    return name


@pytest.fixture(scope="module")
def database(servers: ServerAddresses, migrated: str) -> Iterator[Database]:
    name = f"test_{uuid.uuid4().hex}"
    create_database(servers, name, template=migrated)
    owner_url = owner_url_of(servers, name)
    yield Database(owner_url, url_of(servers, name), *(login_url(owner_url, login) for login in LOGINS))
    with psycopg.connect(servers.postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def create_database(servers: ServerAddresses, name: str, *, template: str = "template1") -> None:
    """Make a database that belongs to `OWNER`, whom all test processes of one server share: so are the roles it makes."""
    statement = sql.SQL("create database {} template {} owner {}").format(
        sql.Identifier(name), sql.Identifier(template), sql.Identifier(OWNER.role)
    )
    with psycopg.connect(servers.postgres_url, autocommit=True) as connection:
        make_owner(connection, OWNER)
        connection.execute(statement)


def url_of(servers: ServerAddresses, name: str) -> str:
    return servers.postgres_url.rpartition("/")[0] + f"/{name}"


def owner_url_of(servers: ServerAddresses, name: str) -> str:
    return login_url(url_of(servers, name), OWNER)


@pytest.fixture(scope="module")
def owner(database: Database) -> Iterator[Engine]:
    """How tests arrange and look at everybody's rows: as the superuser, whom no policy binds.

    What our own code does as the owner goes through `Database.owner_url`, whose role sees no tenant's row.
    """
    engine = connect(database.superuser_url)
    yield engine
    engine.dispose()


@pytest.fixture
def worker(database: Database) -> Iterator[Engine]:
    """The worker's role."""
    engine = connect(database.worker_url)
    yield engine
    engine.dispose()


@pytest.fixture
def schedule(database: Database, owner: Engine) -> Iterator[Engine]:
    """The schedule's role, and nothing for it to do yet."""
    with service_transaction(owner) as session:
        session.execute(text("truncate tenants, retention_marks, audit_entries, leaders cascade"))
    engine = connect(database.schedule_url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(servers: ServerAddresses) -> S3ObjectStore:
    return S3ObjectStore(servers.storage)


def add_tenant(owner: Engine) -> Tenant:
    slug = f"t{uuid.uuid4().hex[:12]}"
    with service_transaction(owner) as session:
        tenant_id = create_tenant(session, slug).id
        api_key = issue_api_key(session, tenant_id, name="test", scopes=ALL_SCOPES).api_key
    return Tenant(tenant_id, slug, str(api_key), api_key.key_id)


@pytest.fixture
def tenant(owner: Engine) -> Tenant:
    return add_tenant(owner)


@pytest.fixture
def other_tenant(owner: Engine) -> Tenant:
    return add_tenant(owner)


@pytest.fixture(scope="module")
def api_url(database: Database, servers: ServerAddresses) -> Iterator[str]:
    """The base URL of a real API process."""
    (port,) = free_ports(1)
    with running_api(database.api_url, servers.storage, port=port):
        yield f"http://127.0.0.1:{port}"


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
        "ESPALIER_DATABASE_URL": database_url,
        "ESPALIER_S3_ENDPOINT": storage.endpoint,
        "ESPALIER_S3_ACCESS_KEY": storage.access_key,
        "ESPALIER_S3_SECRET_KEY": storage.secret_key,
        "ESPALIER_S3_BUCKET": storage.bucket,
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


@pytest.fixture
def client(api_url: str, tenant: Tenant) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api_url}/v1", api_key=tenant.api_key, max_retries=0) as made:
        yield made


@pytest.fixture
def other_client(api_url: str, other_tenant: Tenant) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api_url}/v1", api_key=other_tenant.api_key, max_retries=0) as made:
        yield made


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False, timeout=PATIENCE_SECONDS).is_success
    except httpx.TransportError:
        return False
