"""The world that every test of erasure needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from core.db.session import connect
from core.storage import S3ObjectStore
from tests.databases import Database
from tests.integration.erasure.worlds import World


@pytest.fixture
def world(
    database: Database, schedule: Engine, owner: Engine, worker: Engine, store: S3ObjectStore, api_url: str
) -> Iterator[World]:
    operator = connect(database.api_url)
    yield World(owner, operator, worker, schedule, store, api_url)
    operator.dispose()
