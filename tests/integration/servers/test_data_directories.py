"""Which data directories a server accepts, and who else can read them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from local.locks import find_launcher
from local.processes import ProcessFailedError
from local.servers import LocalServers
from tests.integration.servers.launching import assert_traces, entries, is_open_to_others, leave_traces


def test_data_of_another_postgres_are_refused_with_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(ProcessFailedError, match=r"of PostgreSQL 9; .* Set ESPALIER_POSTGRES_BIN"):
        LocalServers(tmp_path, is_durable=False).start()
    assert find_launcher(tmp_path) is None


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


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
