"""A standby of a running PostgreSQL, as managed servers have one: it follows, and is promoted in a failover."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

from local.binaries import find_postgres
from local.ports import free_ports
from local.privileges import drop_root
from local.processes import ChildProcess, ProcessSpec
from tests.faults import with_port
from tests.waiting import PATIENCE_SECONDS, wait_until


class Standby:
    """A copy of a cluster that takes no writes from `__enter__` until it is promoted."""

    def __init__(self, directory: Path, primary_url: str) -> None:
        directory.mkdir(mode=0o700)
        self._directory, self._primary_url = directory, primary_url
        (self.port,) = free_ports(1)
        self.url = with_port(primary_url, self.port)

    def __enter__(self) -> Self:
        binaries, prefix = find_postgres(), drop_root(self._directory)
        copy = [str(binaries / "pg_basebackup"), "-d", self._primary_url, "-D", str(self._directory)]
        subprocess.run([*prefix, *copy, "--write-recovery-conf", "--checkpoint=fast"], check=True)
        settings = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200")
        argv = [str(binaries / "postgres"), "-D", str(self._directory), "-p", str(self.port)]
        argv += [word for setting in settings for word in ("-c", setting)]
        spec = ProcessSpec(
            "standby", argv, stop_signal=signal.SIGINT, death_signal=signal.SIGINT, prefix=drop_root(self._directory)
        )
        self._process = ChildProcess(spec, self._directory.parent / "standby-logs")
        self._process.wait_until(self._answers, timeout_seconds=PATIENCE_SECONDS)
        wait_until(self._follows, what="replication")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.stop()

    def promote(self) -> None:
        """Let it be the primary."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("select pg_promote(wait => true)")

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url).close()
        except psycopg.OperationalError:
            return False
        return True

    def _follows(self) -> bool:
        with psycopg.connect(self._primary_url) as connection:
            return (
                connection.execute("select from pg_stat_replication where state = 'streaming'").fetchone() is not None
            )
