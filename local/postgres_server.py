"""A real PostgreSQL on a loopback port: scram passwords, no Unix socket, its data in one directory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from psycopg import sql

from core.db.connections import open_connection
from core.db.session import DATABASE_ERRORS
from local.binaries import find_postgres
from local.privileges import drop_root
from local.processes import ProcessFailedError, ProcessSpec

DATABASE = "espalier"
# The details of errors quote rows, and the log is stored in a file.
_TERSE = "log_error_verbosity=terse"
_FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


class PostgresServer:
    """How to start PostgreSQL, and how to see that it answers. The first start makes the cluster."""

    def __init__(self, data_dir: Path, *, port: int, password: str, is_durable: bool) -> None:
        self._binaries = find_postgres()
        self._directory = data_dir / "postgres"
        self._port, self._password, self._is_durable = port, password, is_durable

    @property
    def url(self) -> str:
        return self._url(DATABASE)

    def prepare(self) -> ProcessSpec:
        """Make the cluster if there is none. Raises ProcessFailedError."""
        if not (self._directory / "PG_VERSION").exists():
            self._initialise()
        self._check_version()
        self._remove_stale_lock()
        settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200", _TERSE]
        settings += () if self._is_durable else _FAST
        argv = [str(self._binaries / "postgres"), "-D", str(self._directory), "-p", str(self._port)]
        argv += [word for setting in settings for word in ("-c", setting)]
        return ProcessSpec(
            "postgres",
            argv,
            stop_signal=signal.SIGINT,  # a fast shutdown: sessions are rolled back, and no recovery is needed
            death_signal=signal.SIGINT,
            prefix=drop_root(self._directory),
        )

    def answers(self) -> bool:
        """Return whether it answers. Makes the database if it is missing."""
        try:
            with open_connection(self._url("postgres")) as connection:
                found = connection.execute("select 1 from pg_database where datname = %s", (DATABASE,)).fetchone()
                if not found:
                    connection.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))
        except DATABASE_ERRORS:
            return False
        return True

    def _url(self, database: str) -> str:
        return f"postgresql://postgres:{self._password}@127.0.0.1:{self._port}/{database}"

    def _initialise(self) -> None:
        # Made in another place and then moved, so that an interrupted start leaves no incomplete cluster.
        unfinished, password_file = self._directory.with_suffix(".new"), self._directory.with_suffix(".password")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        prefix = drop_root(unfinished)
        try:
            password_file.touch(mode=0o600)
            os.chown(password_file, unfinished.stat().st_uid, -1)
            password_file.write_text(self._password, encoding="utf-8")
            options = ["-U", "postgres", "-A", "scram-sha-256", f"--pwfile={password_file}", "-E", "UTF8", "--locale=C"]
            argv = [str(self._binaries / "initdb"), "-D", str(unfinished), *options, "--no-instructions"]
            _run([*prefix, *argv, *(() if self._is_durable else ("--no-sync",))])
        finally:
            password_file.unlink(missing_ok=True)
        shutil.rmtree(self._directory, ignore_errors=True)
        unfinished.rename(self._directory)

    def _check_version(self) -> None:
        data_version = (self._directory / "PG_VERSION").read_text(encoding="utf-8").strip()
        said = _run([str(self._binaries / "postgres"), "--version"])
        found = re.search(r"\d+", said)
        if found is None or found.group() != data_version:
            raise ProcessFailedError(
                f"The data in {self._directory} are of PostgreSQL {data_version}; {self._binaries} has {said.strip()}. "
                f"Set ESPALIER_POSTGRES_BIN to the directory of PostgreSQL {data_version}'s binaries."
            )

    def _remove_stale_lock(self) -> None:
        """Remove the lock file of a killed server. PostgreSQL honours it as long as any process has its pid.

        A zombie may keep this pid, and after a restart of the machine another program may have it.
        """
        lock = self._directory / "postmaster.pid"
        if not lock.exists() or not Path("/proc/self").exists():
            return
        command = Path(f"/proc/{lock.read_text(encoding='utf-8').split()[0]}/cmdline")
        if not command.exists() or os.fsencode(self._directory) not in command.read_bytes():
            lock.unlink()


def _run(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProcessFailedError(f"{' '.join(argv)} failed:\n{done.stderr[-2000:]}")
    return done.stdout
