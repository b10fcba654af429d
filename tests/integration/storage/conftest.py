"""A store on a real S3 server, and an independent client of the same server."""

from __future__ import annotations

import uuid

import pytest
from minio import Minio

from core.settings import StorageConfig
from core.storage import (
    S3ObjectStore,
)
from local.servers import ServerAddresses


@pytest.fixture(scope="session")
def config(servers: ServerAddresses) -> StorageConfig:
    return servers.storage


@pytest.fixture(scope="session")
def store(config: StorageConfig) -> S3ObjectStore:
    made = S3ObjectStore(config)
    made.ensure_bucket()
    return made


@pytest.fixture
def prefix() -> str:
    return f"tenants/{uuid.uuid4()}/"


@pytest.fixture
def raw_client(config: StorageConfig) -> Minio:
    """A second, independent view of the server."""
    return Minio(config.endpoint, access_key=config.access_key, secret_key=config.secret_key, secure=False)
