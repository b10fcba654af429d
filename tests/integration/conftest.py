"""A separate migrated database for every test module, and an API process on it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest
from openai import OpenAI
from psycopg import sql
from sqlalchemy import Connection, Engine

from core.db.migrate import login_url
from core.db.session import connect
from core.domain.bases import BaseModelEntry, BaseModelSource, Registry
from core.storage import S3ObjectStore
from local.ports import free_ports
from local.servers import LocalServers, ServerAddresses
from local.stack import prepare_database
from tests.databases import LOGINS, Database, create_database, opened, owner_url_of, run, url_of
from tests.factories.bases import BASE_MODEL
from tests.factories.tenants import Tenant, add_tenant
from tests.processes import running_api


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


@pytest.fixture(scope="module")
def owner(database: Database) -> Iterator[Engine]:
    """How tests arrange and look at everybody's rows: as the superuser, whom no policy binds.

    What our own code does as the owner goes through `Database.owner_url`, whose role sees no tenant's row.
    """
    with opened(database.superuser_url) as engine:
        yield engine


@pytest.fixture
def worker(database: Database) -> Iterator[Engine]:
    """The worker's role. A module whose queues must be empty has a fixture of this name that asks for this one."""
    with opened(database.worker_url) as engine:
        yield engine


@pytest.fixture
def api(database: Database) -> Iterator[Engine]:
    """The API's role."""
    with opened(database.api_url) as engine:
        yield engine


@pytest.fixture
def schedule(database: Database, owner: Engine) -> Iterator[Engine]:
    """The schedule's role, and nothing for it to do yet."""
    run(owner, "truncate tenants, retention_marks, audit_entries, leaders cascade")
    with opened(database.schedule_url) as engine:
        yield engine


@pytest.fixture
def store(servers: ServerAddresses) -> S3ObjectStore:
    return S3ObjectStore(servers.storage)


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


@pytest.fixture
def client(api_url: str, tenant: Tenant) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api_url}/v1", api_key=tenant.api_key, max_retries=0) as made:
        yield made


@pytest.fixture
def other_client(api_url: str, other_tenant: Tenant) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api_url}/v1", api_key=other_tenant.api_key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a PostgreSQL of the module's own: other test processes make the roles in the shared one."""
    with LocalServers(tmp_path_factory.mktemp("servers"), is_durable=False) as own:
        yield own.addresses.postgres_url


@pytest.fixture
def connection(cluster: str) -> Iterator[Connection]:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(cluster, autocommit=True) as owner:
        owner.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        engine = connect(cluster.rpartition("/")[0] + f"/{name}")
        with engine.connect() as opened:
            yield opened
        engine.dispose()
        owner.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
