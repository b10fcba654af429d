"""A launcher of the embedded servers in its own process, and data to find again later."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import redis

from core.storage import S3ObjectStore, StorageError
from local.servers import ServerAddresses

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = """
import json, sys
from pathlib import Path
from local.servers import LocalServers
with LocalServers(Path(sys.argv[1]), is_durable=False) as servers:
    print(json.dumps({"pids": servers.pids, "redis_url": servers.addresses.redis_url}), flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Launcher:
    """A launcher in a process of its own, and its servers."""

    process: subprocess.Popen[str]
    server_pids: tuple[int, ...]
    redis_url: str


@contextmanager
def launcher(data_dir: Path, *, prefix: tuple[str, ...] = (), path: str | None = None) -> Iterator[Launcher]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path or os.environ["PATH"]}
    argv = [*prefix, sys.executable, "-c", LAUNCHER, str(data_dir)]
    with subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the launcher ended without starting its servers"
        told = json.loads(line)
        yield Launcher(process, tuple(told["pids"].values()), told["redis_url"])


def leave_traces(addresses: ServerAddresses) -> None:
    with psycopg.connect(addresses.postgres_url) as connection:
        connection.execute("create table traces (word text)")
        connection.execute("insert into traces values ('row')")
    with redis.Redis.from_url(addresses.redis_url) as client:
        client.set("trace", "value")
    S3ObjectStore(addresses.storage).put_stream("traces/one", [b"object"], content_type="text/plain")


def assert_traces(addresses: ServerAddresses) -> None:
    with psycopg.connect(addresses.postgres_url) as connection:
        assert connection.execute("select word from traces").fetchall() == [("row",)]
    with redis.Redis.from_url(addresses.redis_url) as client:
        assert client.get("trace") == b"value"
    assert b"".join(S3ObjectStore(addresses.storage).get_stream("traces/one")) == b"object"


def as_ordinary_user(directory: Path) -> tuple[str, ...]:
    """Return what to put before a command so that it is not root, and give it the directory."""
    if os.geteuid() != 0:
        return ()
    nobody = pwd.getpwnam("nobody")
    prefix = ("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups")
    asked = subprocess.run(
        [*prefix, sys.executable, "-c", "import sys; print(sys.version)"], capture_output=True, text=True, check=False
    )
    if asked.stdout.strip() != sys.version:  # the interpreter lies in root's own home: nobody cannot reach it
        return ("unshare", "--user", "--map-user=1000", "--map-group=1000")
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    return prefix


def has_traces(addresses: ServerAddresses) -> bool:
    """Return whether all is there; a server that is coming up refuses, or is still loading."""
    try:
        assert_traces(addresses)
    except (psycopg.OperationalError, redis.RedisError, StorageError):
        return False
    return True


def entries(data_dir: Path) -> list[Path]:
    """What lies in a data directory, and the logs; other directories in it are closed themselves."""
    return [*data_dir.iterdir(), *(data_dir / "logs").iterdir()]


def is_open_to_others(path: Path) -> bool:
    return not path.is_symlink() and bool(path.lstat().st_mode & 0o077)
