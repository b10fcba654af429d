"""Where commands find the object store: that of a local stack on the data directory, or the settings'."""

from __future__ import annotations

from pathlib import Path

from cli.environment import reading_settings
from core.settings import S3Settings, StorageConfig
from local.servers import find_addresses


def find_storage(data_dir: Path) -> StorageConfig:
    """Return where the objects are. What is missing is printed, and ends the command."""
    addresses = find_addresses(data_dir)
    if addresses is not None:
        return addresses.storage
    with reading_settings():
        return S3Settings().storage_config  # of the environment
