"""The API's and the worker's roles, on a queue without the jobs of other tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from core.db.session import connect, service_transaction
from tests.databases import Database
from tests.integration.quotas.asking import NUM_AT_ONCE


@pytest.fixture
def api(database: Database) -> Iterator[Engine]:
    engine = connect(database.api_url, pool_size=NUM_AT_ONCE)
    yield engine
    engine.dispose()


@pytest.fixture
def worker(database: Database, owner: Engine) -> Iterator[Engine]:
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs cascade"))
    engine = connect(database.worker_url)
    yield engine
    engine.dispose()
