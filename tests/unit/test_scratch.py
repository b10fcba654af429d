"""A process's scratch directory is removed however the process ended, and no other one is."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest

from core.scratch import Kind, remove_abandoned, scratch_directory

HOLDER = """
import sys
from pathlib import Path
from core.scratch import scratch_directory
with scratch_directory(sys.argv[2], Path(sys.argv[1])) as path:
    (path / "rows.jsonl").write_text("x")
    print(path, flush=True)
    input()
"""


@contextmanager
def holder(parent: Path, kind: Kind = "trainer") -> Iterator[tuple[subprocess.Popen[str], Path]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(parent), kind], **pipes) as process:  # type: ignore[call-overload]
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_directory_is_there_while_it_is_used_and_gone_afterwards(tmp_path: Path) -> None:
    with scratch_directory("trainer", tmp_path) as path:
        assert path.parent == tmp_path
        (path / "deep").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_has_left_goes_and_what_a_living_one_uses_stays(tmp_path: Path) -> None:
    stranger = tmp_path / "espalier-demo"
    stranger.mkdir()
    with holder(tmp_path) as (killed, left), holder(tmp_path) as (_living, used):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left.exists()
        remove_abandoned(tmp_path)
        assert not left.exists()
        assert (used / "rows.jsonl").exists()
        assert stranger.exists()


@pytest.mark.parametrize("kind", get_args(Kind))
def test_whoever_comes_next_removes_what_the_killed_have_left(tmp_path: Path, kind: Kind) -> None:
    with holder(tmp_path, kind) as (killed, left):
        killed.kill()
        killed.wait()
        with scratch_directory("trainer", tmp_path) as path:
            assert set(tmp_path.iterdir()) == {path}
        assert not left.exists()


def test_a_link_that_looks_like_one_is_not_followed(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "kept").touch()
    (tmp_path / "espalier-trainer-x").symlink_to(elsewhere)
    remove_abandoned(tmp_path)
    assert (elsewhere / "kept").exists()
