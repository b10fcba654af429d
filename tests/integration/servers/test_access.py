"""The embedded servers refuse other users, and show them no secret."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from core.storage import S3ObjectStore, StorageError
from local.servers import LocalServers, ServerAddresses
from tests.integration.servers.launching import as_ordinary_user, entries, is_open_to_others, launcher, leave_traces
from tests.waiting import wait_until


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
