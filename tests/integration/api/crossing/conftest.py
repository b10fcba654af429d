"""Two tenants that both own one thing of each kind, and the application with and without row-level security."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from core.db.session import connect
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.tenants import Tenant, add_tenant
from tests.integration.api.crossing.watching import Watched, running
from tests.integration.api.planting import Planted, plant


@pytest.fixture(scope="module")
def api(database: Database) -> Iterator[Engine]:
    engine = connect(database.api_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def store(servers: ServerAddresses) -> S3ObjectStore:
    made = S3ObjectStore(servers.storage)
    made.ensure_bucket()
    return made


@pytest.fixture(scope="module")
def victim(owner: Engine) -> Tenant:
    return add_tenant(owner)


@pytest.fixture(scope="module")
def asker(owner: Engine) -> Tenant:
    return add_tenant(owner)


@pytest.fixture(scope="module")
def planted(owner: Engine, api: Engine, store: S3ObjectStore, victim: Tenant) -> Planted:
    return plant(owner, api, store, victim)


@pytest.fixture(scope="module")
def own(owner: Engine, api: Engine, store: S3ObjectStore, asker: Tenant) -> Planted:
    return plant(owner, api, store, asker)


@pytest.fixture(scope="module")
def walled(database: Database, servers: ServerAddresses) -> Iterator[Watched]:
    """The application as it runs: the API's own database role."""
    with running(database.api_url, servers) as watched:
        yield watched


@pytest.fixture(scope="module")
def unwalled(database: Database, servers: ServerAddresses) -> Iterator[Watched]:
    """The application as a superuser of the database: no row-level security, only the filters."""
    with running(database.superuser_url, servers) as watched:
        yield watched
