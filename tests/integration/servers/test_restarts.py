"""The embedded servers keep their data over restarts, and never outlive their launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from local.binaries import find_redis
from local.locks import AlreadyRunningError, DataDirLock, find_launcher, is_running
from local.servers import LocalServers
from tests.integration.servers.launching import assert_traces, has_traces, launcher, leave_traces
from tests.waiting import wait_until


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


def test_what_the_machine_gets_installed_does_not_take_the_place_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find_redis()
    for name in ("redis-server", "valkey-server"):
        shutil.copy(before, tmp_path / name)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert find_redis() == before


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


def test_a_binary_that_a_setting_names_is_the_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "my-redis"
    shutil.copy(find_redis(), own)
    monkeypatch.setenv("ESPALIER_REDIS_BIN", str(own))
    with LocalServers(tmp_path / "data", is_durable=False) as servers:
        assert psutil.Process(servers.pids["redis"]).exe() == str(own)
