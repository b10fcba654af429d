"""Child processes of the launcher log, stop when asked, are restarted when they die, and are never orphaned."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from local.locks import is_running
from local.processes import ChildProcess, ProcessFailedError, ProcessSpec, as_mortal
from local.supervisor import Supervisor
from tests.waiting import PATIENCE_SECONDS, takes_at_least, wait_until

ROOT = Path(__file__).resolve().parents[2]
DIES = "import sys; print('last words', flush=True); sys.exit(3)"
# Each of these says that it is ready, so that no signal can come too early.
WAITS = "import signal; print('ready', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()"
TIDY = """
import signal, sys
def leave(*_):
    with open(sys.argv[1], 'a') as told:
        told.write(sys.argv[2])
    sys.exit()
signal.signal(signal.SIGTERM, leave)
print('ready', flush=True)
signal.pause()
"""
# So many lines, flushed after every so many (0: as the buffer does it).
TALKS = """
import signal, sys
for number in range(int(sys.argv[1])):
    print(f"{number:07} says the child", flush=bool(int(sys.argv[2])) and number % int(sys.argv[2]) == 0)
print("ready", flush=True)
signal.pause()
"""
PRINTS_AND_TELLS = """
import pathlib, sys
for _ in range(10):
    print("x" * 2**20, flush=True)
pathlib.Path(sys.argv[1]).touch()
"""
LAUNCHER = """
import sys, signal
from pathlib import Path
from local.processes import ChildProcess, ProcessSpec
child = ChildProcess(ProcessSpec('waits', [sys.executable, '-c', sys.argv[2]]), Path(sys.argv[1]))
print(child.pid, flush=True)
signal.pause()
"""


@pytest.fixture
def running() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def make_spec(code: str, *args: str, name: str = "child", stop_seconds: float = 10.0) -> ProcessSpec:
    return ProcessSpec(name, [sys.executable, "-c", code, *args], stop_seconds=stop_seconds)


def start(spec: ProcessSpec, log_dir: Path, running: ExitStack) -> ChildProcess:
    child = ChildProcess(spec, log_dir)
    running.callback(child.kill)
    child.wait_until(lambda: "ready" in child.log_tail(), timeout_seconds=PATIENCE_SECONDS)
    return child


def test_a_child_that_ends_before_it_is_ready_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = ChildProcess(make_spec(DIES), tmp_path)
    with pytest.raises(ProcessFailedError, match=r"child ended \(3\)[\s\S]*child\.log[\s\S]*last words"):
        child.wait_until(lambda: False, timeout_seconds=PATIENCE_SECONDS)


def test_a_child_that_is_never_ready_is_given_up(tmp_path: Path, running: ExitStack) -> None:
    child = start(make_spec(WAITS), tmp_path, running)
    with pytest.raises(ProcessFailedError, match="did not answer in time"):
        child.wait_until(lambda: False, timeout_seconds=0)


def test_a_child_that_ignores_the_request_is_killed_after_its_grace(tmp_path: Path, running: ExitStack) -> None:
    child = start(make_spec(STUBBORN, stop_seconds=0.3), tmp_path, running)
    with takes_at_least(0.3):
        child.stop()
    assert not is_running(child.pid)


def test_a_child_is_no_target_of_the_terminals_ctrl_c(tmp_path: Path, running: ExitStack) -> None:
    child = start(make_spec(WAITS), tmp_path, running)
    assert os.getpgid(child.pid) != os.getpgid(0)
    assert os.getsid(child.pid) != os.getsid(0)


def test_a_log_that_has_grown_large_is_set_aside_at_the_next_start(tmp_path: Path, running: ExitStack) -> None:
    log = tmp_path / "child.log"
    log.write_bytes(b"old\n")
    os.truncate(log, 21 * 2**20)
    start(make_spec(WAITS), tmp_path, running)
    assert log.read_bytes() == b"ready\n"
    assert log.with_suffix(".log.1").stat().st_size == 21 * 2**20


def test_the_log_of_a_child_that_prints_a_lot_is_cut_between_lines_while_it_runs_and_takes_bounded_room(
    tmp_path: Path, running: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local.log_files.FILE_BYTES", 10_000)
    few, many = tmp_path / "few", tmp_path / "many"
    start(make_spec(TALKS, "1000", "0"), few, running)
    assert printed_lines(few) == [*map(numbered_line, range(1000)), "ready"]
    assert len(list(few.glob("child.log*"))) == 3
    assert start(make_spec(TALKS, "5000", "7"), many, running).is_alive
    lines = printed_lines(many)
    assert lines == [*map(numbered_line, range(5000)), "ready"][-len(lines) :], (
        "the newest lines are kept, all in order"
    )
    paths = sorted(many.glob("child.log*"))
    assert [path.name for path in paths] == ["child.log", *(f"child.log.{number}" for number in range(1, 5))]
    assert all(path.stat().st_size <= 10_000 + len(numbered_line(0)) + 1 for path in paths)
    assert len(lines) > 1000
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in paths)
    assert all(path.read_bytes().endswith(b"\n") for path in paths)


def numbered_line(number: int) -> str:
    return f"{number:07} says the child"


def printed_lines(log_dir: Path) -> list[str]:
    """Return the lines of all files of a child's log, the oldest first."""
    paths = sorted(log_dir.glob("child.log*"), reverse=True)
    return "".join(path.read_text() for path in paths).splitlines()


def test_a_line_without_an_end_does_not_make_a_log_grow_for_ever(
    tmp_path: Path, running: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local.log_files.FILE_BYTES", 100_000)
    code = "import signal; print('x' * 3_000_000, 'ready', end='', flush=True); signal.pause()"
    start(make_spec(code), tmp_path, running)
    sizes = [path.stat().st_size for path in tmp_path.glob("child.log*")]
    assert len(sizes) == 5
    assert max(sizes) == 200_000


def test_a_log_that_cannot_be_written_does_not_stop_its_child(
    tmp_path: Path, running: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times what the pipe holds, to a disk that is full."""
    monkeypatch.setattr("local.log_files.open_private", lambda _path, flags: os.open("/dev/full", flags))
    told = tmp_path / "told"
    child = ChildProcess(make_spec(PRINTS_AND_TELLS, str(told)), tmp_path / "logs")
    running.callback(child.kill)
    wait_until(told.exists)


def test_a_child_ends_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", LAUNCHER, str(tmp_path), STUBBORN]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        wait_until(lambda: "ready" in (tmp_path / "waits.log").read_text())
        assert is_running(pid)
        launcher.kill()
    wait_until(lambda: not is_running(pid))


def test_a_child_whose_launcher_died_before_it_began_does_not_begin() -> None:
    argv = as_mortal(make_spec("print('began')"))
    argv[argv.index(str(os.getpid()))] = "1"  # not the parent that it will see
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""


def is_told(child: ChildProcess, word: str) -> bool:
    return word in child.log_tail()


def test_children_are_stopped_in_reverse_order_each_before_the_next(tmp_path: Path) -> None:
    told = tmp_path / "told"
    supervisor = Supervisor(tmp_path)
    for name in ("a", "b", "c"):
        child = supervisor.start(make_spec(TIDY, str(told), name, name=name))
        child.wait_until(partial(is_told, child, "ready"), timeout_seconds=PATIENCE_SECONDS)
    pids = supervisor.pids
    supervisor.stop()
    assert told.read_text() == "cba"
    assert not any(map(is_running, pids.values()))


def test_a_child_that_died_comes_back_after_a_delay_that_grows_and_the_living_are_left_alone(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    try:
        steady = supervisor.start(make_spec(WAITS, name="steady"))
        supervisor.start(make_spec(DIES, name="weak"))
        for delay_seconds in (0.5, 1.0, 2.0):
            with takes_at_least(delay_seconds):
                await_revival(supervisor, "weak")
        assert supervisor.process("steady").pid == steady.pid
    finally:
        supervisor.stop()


def test_a_child_that_cannot_be_started_again_is_tried_again_after_a_delay_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local.supervisor._DELAYS_SECONDS", (0.1, 0.2, 0.4))
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    supervisor = Supervisor(tmp_path)
    try:
        steady = supervisor.start(make_spec(WAITS, name="steady"))
        died = supervisor.start(replace(make_spec(DIES, name="weak"), cwd=home))
        wait_until(lambda: not died.is_alive)
        home.rename(away)  # no process can be started there, as when the machine has no room for one
        wait_until(lambda: not supervisor.revive() and supervisor._charges["weak"].num_deaths > 3)
        assert supervisor.process("weak") is died
        assert supervisor.process("steady").pid == steady.pid
        away.rename(home)
        wait_until(lambda: supervisor.revive() == ("weak",))
    finally:
        supervisor.stop()


def await_revival(supervisor: Supervisor, name: str) -> None:
    died = supervisor.process(name)
    wait_until(lambda: not died.is_alive)
    assert supervisor.revive() == (), "revive must not wait for the delay that begins here"
    wait_until(lambda: supervisor.revive() == (name,))
    assert supervisor.process(name).pid != died.pid


def test_a_child_that_ran_for_long_comes_back_as_soon_as_one_that_died_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local.supervisor._HEALTHY_SECONDS", 0.0)
    monkeypatch.setattr("local.supervisor._DELAYS_SECONDS", (0.1, 3600.0))
    supervisor = Supervisor(tmp_path)
    try:
        supervisor.start(make_spec(DIES, name="mostly well"))
        for _ in range(2):
            await_revival(supervisor, "mostly well")
    finally:
        supervisor.stop()


def test_a_child_is_told_its_environment_and_none_of_it_is_shown(
    tmp_path: Path, running: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORD", "the launcher's own")
    code = "import os, signal; print('ready', os.environ['WORD'], 'PATH' in os.environ, flush=True); signal.pause()"
    spec = ProcessSpec("child", [sys.executable, "-c", code], {"WORD": "hush"})
    assert "hush" not in repr(spec)
    child = start(spec, tmp_path, running)
    assert child.log_tail() == "ready hush True\n"
