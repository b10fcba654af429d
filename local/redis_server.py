"""A real Redis (or Valkey) on a loopback port, with a password and an append-only file in one directory."""

from __future__ import annotations

import signal
from pathlib import Path

import redis

from local.binaries import find_redis
from local.private_files import make_private, write_private
from local.processes import ProcessSpec
from local.versions import ask_program, claim_data

_REMEDY = (
    "Set ESPALIER_REDIS_BIN to a server that can, or move {} away: it holds wake-ups and rates only, which come again."
)


class RedisServer:
    """How to start Redis, and how to see that it answers."""

    def __init__(self, data_dir: Path, *, port: int, password: str, is_durable: bool) -> None:
        self._binary = find_redis()
        self._directory = data_dir / "redis"
        self._port, self._password, self._is_durable = port, password, is_durable

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    def prepare(self) -> ProcessSpec:
        """Write the settings to a file, because they include the password, and all users can read command lines.

        Raises ProcessFailedError for data that this program cannot read.
        """
        make_private(self._directory)
        program = ask_program([str(self._binary), "--version"], r"(?P<kind>\w+) server v=(?P<version>\d+(\.\d+)*)")
        claim_data(self._directory, program, remedy=_REMEDY.format(self._directory))
        settings = (
            f"port {self._port}",
            "bind 127.0.0.1",
            f"requirepass {self._password}",
            "appendonly yes",
            f"appendfsync {'everysec' if self._is_durable else 'no'}",
            'save ""',
            "maxmemory-policy noeviction",
        )
        config = self._directory / "redis.conf"
        write_private(config, "\n".join(settings))
        return ProcessSpec("redis", [str(self._binary), config.name], death_signal=signal.SIGTERM, cwd=self._directory)

    def answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=2) as client:
                return bool(client.ping())
        except redis.RedisError:  # still starting or loading, or another server; `wait_until` will report that
            return False
