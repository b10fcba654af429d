"""A trainer's scratch directory goes with it, however it ended, and nobody else's does."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from worker.scratch import remove_abandoned, scratch_directory

HOLDER = """
from worker.scratch import scratch_directory
with scratch_directory() as path:
    (path / "rows.jsonl").write_text("x")
    print(path, flush=True)
    input()
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@contextmanager
def holder() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER], **pipes) as process:  # type: ignore[call-overload]
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_directory_is_there_while_it_is_used_and_gone_afterwards(parent: Path) -> None:
    with scratch_directory() as path:
        assert path.parent == parent
        (path / "deep").mkdir()
    assert list(parent.iterdir()) == []


def test_what_a_killed_process_has_left_goes_and_what_a_living_one_uses_stays(parent: Path) -> None:
    stranger = parent / "espalier-demo"
    stranger.mkdir()
    with holder() as (killed, left), holder() as (_living, used):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left.exists()
        remove_abandoned(parent)
        assert not left.exists()
        assert (used / "rows.jsonl").exists()
        assert stranger.exists()


def test_whoever_comes_next_removes_what_the_killed_have_left(parent: Path) -> None:
    with holder() as (killed, left):
        killed.kill()
        killed.wait()
        with scratch_directory() as path:
            assert set(parent.iterdir()) == {path}
        assert not left.exists()


def test_a_link_that_looks_like_one_is_not_followed(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "kept").touch()
    (parent / "espalier-trainer-x").symlink_to(elsewhere)
    remove_abandoned(parent)
    assert (elsewhere / "kept").exists()
