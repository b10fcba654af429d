"""Where commands find the object store: the local stack's on the data directory, or the one in the settings."""

from __future__ import annotations

from pathlib import Path

from cli.environment import reading_settings
from core.settings import S3Settings, StorageConfig
from local.servers import find_addresses


def find_storage(data_dir: Path) -> StorageConfig:
    """Return where the objects are. If something is missing, print it and end the command."""
    addresses = find_addresses(data_dir)
    if addresses is not None:
        return addresses.storage
    with reading_settings():
        return S3Settings().storage_config
