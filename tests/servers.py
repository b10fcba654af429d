"""One set of real servers for a whole run of the tests, shared by its xdist workers.

A separate keeper process runs the servers. Every worker that uses them holds a shared lock. The keeper waits for the
exclusive lock and gets it when the last user has ended in any way. Then it stops the servers and exits.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

from core.settings import StorageConfig
from local.servers import LocalServers, ServerAddresses

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def shared_servers(directory: Path) -> Iterator[ServerAddresses]:
    """Yield the addresses of the servers that everybody who names this directory shares."""
    directory.mkdir(exist_ok=True)
    with _locked(directory / "users.lock", fcntl.LOCK_SH):
        # From here to the end no keeper can stop: one that was stopping has released its lock, and is gone.
        with _locked(directory / "start.lock", fcntl.LOCK_EX):
            if not _is_held(directory / "keeper.lock"):
                _start_keeper(directory)
            addresses = _read_addresses(directory)
        yield addresses
    _await_stop(directory)


@contextmanager
def _locked(path: Path, mode: int) -> Iterator[IO[str]]:
    with path.open("a", encoding="utf-8") as lock:
        fcntl.flock(lock, mode)
        yield lock


def _is_held(path: Path) -> bool:
    with path.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _start_keeper(directory: Path) -> None:
    """Start a keeper that outlives this process, and return when its servers answer."""
    argv = [sys.executable, __file__, str(directory)]
    with (directory / "keeper.log").open("ab") as log:
        done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise RuntimeError(f"The tests' servers did not start:\n{(directory / 'keeper.log').read_text()[-4000:]}")


def _await_stop(directory: Path) -> None:
    """Wait until the keeper is gone, unless others still use it."""
    while _is_held(directory / "keeper.lock"):
        with (directory / "users.lock").open("a") as users:
            try:
                fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # the keeper has it: it is stopping
                fcntl.flock(users, fcntl.LOCK_SH)
                return
        if _is_held(directory / "users.lock"):
            return


def _read_addresses(directory: Path) -> ServerAddresses:
    fields = json.loads((directory / "addresses.json").read_text(encoding="utf-8"))
    return ServerAddresses(fields["postgres_url"], fields["redis_url"], StorageConfig(**fields["storage"]))


def _keep(directory: Path) -> None:
    """Be the keeper: a fork that lives on in a session of its own, while the caller waits until its servers answer."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os._exit(0 if os.read(reader, 1) else 1)
    os.close(reader)
    os.setsid()
    with (
        _locked(directory / "keeper.lock", fcntl.LOCK_EX),
        LocalServers(directory / f"servers-{os.getpid()}", is_durable=False) as servers,
    ):
        (directory / "addresses.json").write_text(json.dumps(asdict(servers.addresses)), encoding="utf-8")
        os.write(writer, b"1")
        os.close(writer)
        # Held until this process ends, so that the next user waits until nothing of these servers is left.
        users = (directory / "users.lock").open("a", encoding="utf-8")
        fcntl.flock(users, fcntl.LOCK_EX)
    users.close()


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
