"""The embedded servers: they answer, keep what they are given, refuse strangers, and never outlive their launcher."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from core.storage import S3ObjectStore, StorageError
from local.binaries import find_redis
from local.locks import AlreadyRunningError, DataDirLock, find_launcher, is_running
from local.processes import ProcessFailedError
from local.servers import LocalServers, ServerAddresses
from tests.waiting import wait_until

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


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


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


def test_a_restart_keeps_rows_objects_and_addresses_and_needs_no_short_or_plain_path(tmp_path: Path) -> None:
    data_dir = tmp_path / "a path with spaces" / ("long" * 20)  # longer than the path of a Unix socket may be
    with LocalServers(data_dir) as first:
        leave_traces(first.addresses)
    with LocalServers(data_dir) as second:
        assert second.addresses == first.addresses
        assert_traces(second.addresses)


def test_a_restart_moves_away_from_a_port_that_was_taken_and_keeps_the_data(tmp_path: Path) -> None:
    with LocalServers(tmp_path, is_durable=False) as first:
        leave_traces(first.addresses)
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        host, port = first.addresses.storage.endpoint.split(":")
        squatter.bind((host, int(port)))
        squatter.listen()
        with LocalServers(tmp_path, is_durable=False) as second:
            assert second.addresses.storage.endpoint != first.addresses.storage.endpoint
            assert_traces(second.addresses)


def test_the_next_launcher_waits_for_the_servers_of_one_that_was_killed(tmp_path: Path) -> None:
    with launcher(tmp_path) as killed:
        s3_pid, redis_pid, postgres_pid = killed.server_pids
        os.kill(redis_pid, signal.SIGSTOP)  # this one will not end before it is let
        killed.process.kill()
        killed.process.wait()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(DataDirLock, tmp_path)
            wait_until(lambda: not is_running(s3_pid) and not is_running(postgres_pid))
            assert not waiting.done()
            os.kill(redis_pid, signal.SIGCONT)
            waiting.result().close()
        assert not is_running(redis_pid)
    with launcher(tmp_path) as following, redis.Redis.from_url(following.redis_url) as client:
        assert client.ping()


def test_servers_end_with_a_launcher_that_is_killed_when_nobody_follows(tmp_path: Path) -> None:
    with launcher(tmp_path) as killed:
        postgres = psutil.Process(killed.server_pids[-1])
        everything = [*killed.server_pids, *(child.pid for child in postgres.children(recursive=True))]
        killed.process.kill()
        killed.process.wait()
        wait_until(lambda: not any(map(is_running, everything)))
    assert find_launcher(tmp_path) is None


def test_a_second_launcher_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    with launcher(tmp_path) as first:
        with pytest.raises(AlreadyRunningError, match=f"process {first.process.pid}"):
            LocalServers(tmp_path).start()
        assert find_launcher(tmp_path) == first.process.pid
        assert all(map(is_running, first.server_pids))


def test_no_server_takes_a_wrong_password(servers: ServerAddresses) -> None:
    password = psycopg.conninfo.conninfo_to_dict(servers.postgres_url)["password"]
    for wrong_url in (
        servers.postgres_url.replace(str(password), "wrong"),
        servers.postgres_url.replace(f":{password}", ""),
    ):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(wrong_url)
    for wrong_url in (
        "redis://:wrong@" + servers.redis_url.partition("@")[2],
        "redis://" + servers.redis_url.partition("@")[2],
    ):
        with redis.Redis.from_url(wrong_url) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    for stranger in (replace(servers.storage, secret_key="wrong"), replace(servers.storage, access_key="wrong")):
        with pytest.raises(StorageError):
            list(S3ObjectStore(stranger).list_keys(""))


def test_servers_listen_on_loopback_only_and_show_no_secret_to_other_users(tmp_path: Path) -> None:
    with LocalServers(tmp_path, is_durable=False) as servers:
        processes = [psutil.Process(pid) for pid in servers.pids.values()]
        # PostgreSQL, Redis, and the five servers of SeaweedFS with two listeners each, of which some come up late.
        wait_until(lambda: len(listening_addresses(processes)) >= 12)
        assert set(listening_addresses(processes)) == {"127.0.0.1"}
        shown = "\n".join(" ".join(process.cmdline()) for process in processes)
        secrets = json.loads((tmp_path / "secrets.json").read_text())
        assert not any(secret in shown for secret in secrets.values())
    holders = [
        path for path in tmp_path.glob("*/*") if path.is_file() and secrets["redis"].encode() in path.read_bytes()
    ]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "secrets.json", *holders)] == [0o600, 0o600]


def listening_addresses(processes: list[psutil.Process]) -> list[str]:
    connections = [each for process in processes for each in process.net_connections("inet")]
    return [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]


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


def test_an_ordinary_user_can_run_the_servers(open_directory: Path) -> None:
    with launcher(open_directory / "data", prefix=as_ordinary_user(open_directory)) as running:
        ours, theirs = (
            {namespace_and_user(pid) for pid in pids} for pids in ((running.process.pid,), running.server_pids)
        )
        assert theirs == ours


def namespace_and_user(pid: int) -> tuple[Path, int]:
    return Path(f"/proc/{pid}/ns/user").readlink(), psutil.Process(pid).uids().real


def test_root_can_run_the_servers_where_user_namespaces_are_refused(open_directory: Path) -> None:
    refusing = open_directory / "bin" / "unshare"
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/sh\nexit 1\n")
    refusing.chmod(0o755)
    with launcher(open_directory / "data", path=f"{refusing.parent}:{os.environ['PATH']}") as running:
        assert psutil.Process(running.server_pids[-1]).uids().real != 0
    # What one user has made, another start serves as that user, namespaces or not.
    with launcher(open_directory / "data") as again:
        assert psutil.Process(again.server_pids[-1]).uids().real == (open_directory / "data/postgres").stat().st_uid
    # That user's group may pass through the directory to its own, and nobody may read it.
    assert stat.S_IMODE((open_directory / "data").stat().st_mode) == 0o710
    assert not [path for path in entries(open_directory / "data") if is_open_to_others(path)]


def test_a_first_start_that_was_cut_off_is_made_good(tmp_path: Path) -> None:
    half_made = tmp_path / "postgres.new"
    half_made.mkdir()
    (half_made / "PG_VERSION").write_text("18\n")
    with (
        LocalServers(tmp_path, is_durable=False) as servers,
        psycopg.connect(servers.addresses.postgres_url) as connection,
    ):
        assert connection.execute("select 1").fetchone() == (1,)
    assert not half_made.exists()


def test_a_lock_of_postgres_whose_pid_another_program_has_got_is_no_obstacle(tmp_path: Path) -> None:
    with LocalServers(tmp_path, is_durable=False):
        left = (tmp_path / "postgres" / "postmaster.pid").read_text().splitlines()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:  # which ends with its input
        lines = [str(other.pid), *left[1:]]
        (tmp_path / "postgres" / "postmaster.pid").write_text("\n".join(lines) + "\n")
        with LocalServers(tmp_path, is_durable=False) as servers:
            assert set(servers.pids) == {"s3", "redis", "postgres"}


def test_data_of_another_postgres_are_refused_with_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(ProcessFailedError, match=r"of PostgreSQL 9; .* Set ESPALIER_POSTGRES_BIN"):
        LocalServers(tmp_path, is_durable=False).start()
    assert find_launcher(tmp_path) is None


def test_what_the_machine_gets_installed_does_not_take_the_place_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find_redis()
    for name in ("redis-server", "valkey-server"):
        shutil.copy(before, tmp_path / name)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert find_redis() == before


@pytest.mark.parametrize(
    ("name", "writer", "setting"),
    [
        ("redis", "Redis 7.4.2", "ESPALIER_REDIS_BIN"),
        ("redis", "Valkey 99.0.1", "ESPALIER_REDIS_BIN"),
        ("s3", "SeaweedFS 99.1", "ESPALIER_S3_BIN"),
    ],
)
def test_data_that_a_server_cannot_read_are_refused_with_the_setting_to_change(
    name: str, writer: str, setting: str, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "written_by").write_text(f"{writer}\n")
    with pytest.raises(ProcessFailedError, match=rf"are of {writer}, which .* cannot read\. Set {setting} to"):
        LocalServers(tmp_path, is_durable=False).start()
    assert find_launcher(tmp_path) is None


def test_data_without_a_note_tell_by_themselves_who_began_them(tmp_path: Path) -> None:
    files = tmp_path / "redis" / "appendonlydir"
    files.mkdir(parents=True)
    (files / "appendonly.aof.1.base.rdb").write_bytes(b"REDIS0012\xfa\x09redis-ver\x058.2.1\xfa\x0aredis-bits\xc0@")
    with pytest.raises(ProcessFailedError, match=r"are of Redis 8\.2\.1, which Valkey .* cannot read"):
        LocalServers(tmp_path, is_durable=False).start()


@pytest.mark.parametrize("writer", [None, "Redis 7.0.15", "Valkey 8.1.0"])
def test_data_of_an_older_server_or_launcher_are_read_and_who_writes_now_is_noted(
    writer: str | None, tmp_path: Path
) -> None:
    with LocalServers(tmp_path, is_durable=False) as servers:
        leave_traces(servers.addresses)
    notes = [tmp_path / name / "written_by" for name in ("redis", "s3")]
    now = [note.read_text() for note in notes]
    notes[1].unlink()
    notes[0].unlink() if writer is None else notes[0].write_text(f"{writer}\n")
    with LocalServers(tmp_path, is_durable=False) as servers:
        assert_traces(servers.addresses)
    assert [note.read_text() for note in notes] == now
    assert re.fullmatch(r"Valkey \d+\.\d+\.\d+\nSeaweedFS \d+\.\d+\n", "".join(now))


def test_the_sockets_of_servers_that_were_killed_go_with_the_next_start_wherever_that_is(tmp_path: Path) -> None:
    with launcher(tmp_path / "first") as killed:
        ports = json.loads((tmp_path / "first" / "ports.json").read_text())["s3"]
        for pid in killed.server_pids:
            os.kill(pid, signal.SIGKILL)
        killed.process.kill()
        killed.process.wait()
    with LocalServers(tmp_path / "second", is_durable=False):
        pass
    left = {int(path.stem.rpartition("-")[2]) for path in Path("/tmp").glob("seaweedfs-*.sock")}
    assert not left & set(ports.values())


@pytest.mark.parametrize("name", ["s3", "redis", "postgres"])
def test_a_server_that_was_killed_comes_back_in_its_place_with_its_data(name: str, tmp_path: Path) -> None:
    with LocalServers(tmp_path) as servers:
        leave_traces(servers.addresses)
        before = servers.pids
        os.kill(before[name], signal.SIGKILL)
        wait_until(lambda: servers.revive() == (name,))
        assert {key for key in before if servers.pids[key] != before[key]} == {name}
        wait_until(lambda: has_traces(servers.addresses))


def has_traces(addresses: ServerAddresses) -> bool:
    """Return whether all is there; a server that is coming up refuses, or is still loading."""
    try:
        assert_traces(addresses)
    except (psycopg.OperationalError, redis.RedisError, StorageError):
        return False
    return True


def test_a_binary_that_a_setting_names_is_the_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "my-redis"
    shutil.copy(find_redis(), own)
    monkeypatch.setenv("ESPALIER_REDIS_BIN", str(own))
    with LocalServers(tmp_path / "data", is_durable=False) as servers:
        assert psutil.Process(servers.pids["redis"]).exe() == str(own)


def test_a_data_directory_that_others_could_read_is_closed_with_all_that_it_holds(open_directory: Path) -> None:
    data_dir = open_directory / "data"
    with LocalServers(data_dir, is_durable=False):
        pass
    for path in (data_dir, *data_dir.iterdir(), *(data_dir / "logs").iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (data_dir / "postgres").chmod(0o700)  # PostgreSQL itself refuses anything else
    with umask(0o000), LocalServers(data_dir, is_durable=False):
        assert not [path for path in (data_dir, *entries(data_dir)) if is_open_to_others(path)]


def test_what_everybody_shares_is_left_as_it_is_and_what_is_made_in_it_is_closed(open_directory: Path) -> None:
    open_directory.chmod(0o1777)
    (open_directory / "note").write_text("somebody's")
    (open_directory / "note").chmod(0o644)
    with umask(0o000), LocalServers(open_directory, is_durable=False):
        assert stat.S_IMODE(open_directory.stat().st_mode) == 0o1777
        assert [path.name for path in entries(open_directory) if is_open_to_others(path)] == ["note"]


def test_what_others_keep_in_a_data_directory_stays_as_it_is_and_what_is_made_beside_it_is_closed(
    open_directory: Path,
) -> None:
    (open_directory / "run.sh").touch()
    (open_directory / "run.sh").chmod(0o755)
    (open_directory / "source").mkdir(mode=0o755)
    before = {path: path.stat().st_mode for path in (open_directory, *open_directory.iterdir())}
    with umask(0o000), LocalServers(open_directory, is_durable=False):
        pass
    (open_directory / "secrets.json").chmod(0o644)  # as an older version may have left it
    with umask(0o000), LocalServers(open_directory, is_durable=False):
        assert {path: path.stat().st_mode for path in before} == before
        assert {path for path in entries(open_directory) if is_open_to_others(path)} == set(before) - {open_directory}


def entries(data_dir: Path) -> list[Path]:
    """What lies in a data directory, and the logs; other directories in it are closed themselves."""
    return [*data_dir.iterdir(), *(data_dir / "logs").iterdir()]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def is_open_to_others(path: Path) -> bool:
    return not path.is_symlink() and bool(path.lstat().st_mode & 0o077)


def test_no_server_logs_a_value_that_it_refused(tmp_path: Path) -> None:
    with LocalServers(tmp_path, is_durable=False) as servers:
        with psycopg.connect(servers.addresses.postgres_url) as connection:
            connection.execute("create table words (word text primary key)")
            with pytest.raises(psycopg.errors.UniqueViolation):
                connection.execute("insert into words values (%s), (%s)", ["hush-79", "hush-79"])
        with redis.Redis.from_url(servers.addresses.redis_url) as client, pytest.raises(redis.ResponseError):
            client.execute_command("no-such-command", "hush-79")
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert "duplicate key value" in logs["postgres.log"]
    assert not [name for name, log in logs.items() if "hush-79" in log]


def test_every_server_logs_to_files_that_are_replaced_while_it_runs_and_to_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local.log_files.FILE_BYTES", 200)
    old = tmp_path / "s3" / "weed.host.root.log.INFO.20260101-000000.1"
    old.parent.mkdir()
    old.write_text("of an earlier version")
    with LocalServers(tmp_path, is_durable=False) as servers:
        leave_traces(servers.addresses)
        for name in ("postgres", "redis", "s3"):
            wait_until((tmp_path / "logs" / f"{name}.log.1").exists, what=f"a second file of {name}'s log")
        assert len(list((tmp_path / "logs").iterdir())) <= 3 * 5
        assert not [path for path in tmp_path.rglob("*weed*") if path.parent.name != "logs"]
