"""Real PostgreSQL, Redis and S3 servers as child processes, on loopback ports, with their data in one directory.

Passwords are made at the first start and stored in `secrets.json` (mode 0600). Data and passwords survive restarts, and
so do ports if no other process has taken them. A directory has one launcher: a second one is refused.
"""

from __future__ import annotations

import json
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from core.settings import StorageConfig
from local.locks import DataDirLock, find_launcher
from local.ports import Ports
from local.postgres_server import PostgresServer
from local.private_files import close_data_dir, write_private
from local.processes import ChildProcess, ProcessFailedError, ProcessSpec
from local.redis_server import RedisServer
from local.s3_server import S3Server, remove_abandoned_sockets
from local.supervisor import Supervisor

_START_SECONDS = 30.0
_START_ATTEMPTS = 3


class Server(Protocol):
    """A server that can be run. `prepare` is called once, `answers` until it returns True."""

    def prepare(self) -> ProcessSpec: ...

    def answers(self) -> bool: ...


@dataclass(frozen=True)
class ServerAddresses:
    """The addresses of the three servers. `postgres_url` is the owner's."""

    postgres_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    storage: StorageConfig


@dataclass(frozen=True)
class Secrets:
    postgres: str = field(repr=False)
    redis: str = field(repr=False)
    s3_access: str = field(repr=False)
    s3_secret: str = field(repr=False)
    api: str = field(repr=False)
    worker: str = field(repr=False)
    schedule: str = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> Secrets:
        """Read the secrets of a data directory, or make them."""
        if path.exists():
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        made = cls(**{each.name: secrets.token_hex(16) for each in fields(cls)})
        write_private(path, json.dumps(asdict(made)))
        return made


class LocalServers:
    """The three servers of one data directory. `is_durable=False` trades crash safety for speed, in tests.

    Start them from a thread that outlives them: on Linux they end with that thread.
    """

    def __init__(self, data_dir: Path, *, is_durable: bool = True) -> None:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.data_dir = data_dir.resolve()
        self._is_durable = is_durable
        self._lock: DataDirLock | None = None
        self._supervisor = Supervisor(self.data_dir / "logs")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> ServerAddresses:
        """Start all three in parallel and wait until they answer. Raises AlreadyRunningError, ProcessFailedError."""
        self._lock = DataDirLock(self.data_dir)
        close_data_dir(self.data_dir)
        self.secrets = Secrets.load(self.data_dir / "secrets.json")
        try:
            self.addresses = self._start_on_free_ports()
        except BaseException:
            self.stop()
            raise
        return self.addresses

    def revive(self) -> tuple[str, ...]:
        """Restart each dead server whose delay has passed, on its port and data. Return the names."""
        return self._supervisor.revive()

    def stop(self) -> None:
        self._stop_servers()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def pids(self) -> dict[str, int]:
        return self._supervisor.pids

    def _start_on_free_ports(self) -> ServerAddresses:
        """Start a server. If another process took its port between the check and the bind, start it on another port."""
        for attempt in range(_START_ATTEMPTS):
            ports = Ports.choose(self.data_dir / "ports.json")
            try:
                return self._start_on(ports)
            except ProcessFailedError:
                self._stop_servers()
                if ports.are_free or attempt == _START_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _start_on(self, ports: Ports) -> ServerAddresses:
        made, directory, is_durable = self.secrets, self.data_dir, self._is_durable
        s3 = S3Server(directory, ports=ports.s3, access_key=made.s3_access, secret_key=made.s3_secret)
        redis = RedisServer(directory, port=ports.redis, password=made.redis, is_durable=is_durable)
        postgres = PostgresServer(directory, port=ports.postgres, password=made.postgres, is_durable=is_durable)
        # the first two start while the third makes its cluster
        started = [(server, self._spawn(server)) for server in (s3, redis, postgres)]
        with ThreadPoolExecutor(thread_name_prefix="wait for server") as waiting:
            list(waiting.map(lambda pair: pair[1].wait_until(pair[0].answers, timeout_seconds=_START_SECONDS), started))
        return ServerAddresses(postgres.url, redis.url, s3.config)

    def _spawn(self, server: Server) -> ChildProcess:
        assert self._lock is not None
        return self._supervisor.start(replace(server.prepare(), inherited_fds=(self._lock.fileno(),)))

    def _stop_servers(self) -> None:
        for name in self._supervisor.pids:  # in parallel: none needs another to stop
            self._supervisor.process(name).ask_to_stop()
        self._supervisor.stop()
        remove_abandoned_sockets()


def find_addresses(data_dir: Path) -> ServerAddresses | None:
    """Return the addresses of the servers that another process runs on a data directory, or None."""
    ports = Ports.read(data_dir / "ports.json")
    if ports is None or find_launcher(data_dir) is None:
        return None
    made = Secrets.load(data_dir / "secrets.json")
    return ServerAddresses(
        PostgresServer(data_dir, port=ports.postgres, password=made.postgres, is_durable=True).url,
        RedisServer(data_dir, port=ports.redis, password=made.redis, is_durable=True).url,
        S3Server(data_dir, ports=ports.s3, access_key=made.s3_access, secret_key=made.s3_secret).config,
    )
