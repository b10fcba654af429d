"""The worker's role, on queues without the jobs of other tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from core.db.session import connect, service_transaction
from tests.databases import Database


@pytest.fixture
def worker(database: Database, owner: Engine) -> Iterator[Engine]:
    """The worker's role on queues that are empty of other tests' jobs."""
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs, queues, workers, pools cascade"))
        session.execute(text("update tenants set usage = 0, lift = 0"))
    engine = connect(database.worker_url)
    yield engine
    engine.dispose()
