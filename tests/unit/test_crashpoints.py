"""A crash point kills the process at the named place and pass, and is inert otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = (
    "from core.crashpoints import CrashPoint, reach\nfor n in (1, 2, 3): reach(CrashPoint.UPLOAD); print(n, flush=True)"
)


def run(crashpoint: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CRASHPOINT": crashpoint}
    return subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("crashpoint", ["", "post_claim:1", "upload:4"])
def test_a_crash_point_that_is_not_named_or_not_reached_is_inert(crashpoint: str) -> None:
    done = run(crashpoint)
    assert (done.returncode, done.stdout.split()) == (0, ["1", "2", "3"])


def test_the_process_dies_at_the_named_pass_as_if_the_power_were_cut() -> None:
    done = run("upload:2")
    assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, ["1"])


def test_with_a_fuse_it_dies_only_once(tmp_path: Path) -> None:
    fuse = tmp_path / "fuse"
    fuse.touch()
    assert run(f"upload:1:{fuse}").returncode == -signal.SIGKILL
    assert run(f"upload:1:{fuse}").returncode == 0
