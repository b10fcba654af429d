"""Servers that run elsewhere and are named by settings. `espalier up --external` uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import redis

from core.db.connections import open_connection
from core.redis_urls import read_redis_url
from core.settings import SETTINGS_ERRORS, OwnerSettings, RedisSettings, S3Settings, describe_faults, variable_of
from core.storage import S3ObjectStore, StorageError
from local.locks import DataDirLock
from local.private_files import close_data_dir
from local.servers import Secrets, ServerAddresses

OWNER_URL_SETTING = variable_of("owner_database_url")
_CONNECT_SECONDS = 5


class ExternalServersError(Exception):
    """A setting that names a server is missing or wrong, or the server does not answer. The message names it."""


class ExternalServers:
    """Like LocalServers, but the data directory holds only the lock, the logs and the runtime roles' passwords."""

    def __init__(self, data_dir: Path) -> None:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.data_dir = data_dir.resolve()
        self._lock: DataDirLock | None = None

    def start(self) -> ServerAddresses:
        """Read where the servers are, and connect to each. Raises ExternalServersError, AlreadyRunningError."""
        addresses = _read_addresses()
        _ask_all(addresses)
        self._lock = DataDirLock(self.data_dir)
        close_data_dir(self.data_dir)
        self.secrets = Secrets.load(self.data_dir / "secrets.json")
        self.addresses = addresses
        return addresses

    def stop(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def revive(self) -> tuple[str, ...]:
        """Start nothing: these servers are supervised elsewhere."""
        return ()

    @property
    def pids(self) -> dict[str, int]:
        return {}


def _read_addresses() -> ServerAddresses:
    try:
        owner_url = OwnerSettings().owner_url
        if not owner_url:
            raise ExternalServersError(f"Set {OWNER_URL_SETTING} to the URL of the database's owner, postgresql://...")
        return ServerAddresses(owner_url, RedisSettings().redis_url.get_secret_value(), S3Settings().storage_config)
    except SETTINGS_ERRORS as error:
        raise ExternalServersError(f"These settings are missing or wrong: {describe_faults(error)}.") from None


def _ask_all(addresses: ServerAddresses) -> None:
    """Connect to each server once, and make the bucket if it is missing."""
    with _naming(OWNER_URL_SETTING, psycopg.Error):
        open_connection(addresses.postgres_url).close()
    arguments = read_redis_url(addresses.redis_url).arguments
    with (
        _naming("ESPALIER_REDIS_URL", redis.RedisError),
        redis.Redis.from_url(**arguments, socket_connect_timeout=_CONNECT_SECONDS) as client,
    ):
        client.ping()
    with _naming("ESPALIER_S3_ENDPOINT and its keys", StorageError, ValueError):
        S3ObjectStore(addresses.storage).ensure_bucket()


@contextmanager
def _naming(setting: str, *errors: type[Exception]) -> Iterator[None]:
    """Name the setting that leads to a server that does not answer."""
    try:
        yield
    except errors as error:
        raise ExternalServersError(f"The server that {setting} names does not answer: {error}") from error
