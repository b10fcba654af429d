"""The processes of a stack: restarts, shutdown, and which process holds which password."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from local.external import ExternalServers
from local.locks import find_launcher, is_running
from local.ports import free_ports
from local.processes import ProcessSpec
from local.stack import LocalStack, PortTakenError, StackState
from tests.integration.stack.running import ESPALIER, Up, clean, espalier, fail_up, list_models, run_up, status_of
from tests.waiting import wait_until


def test_a_worker_that_died_is_started_again_and_up_says_so(up: Up) -> None:
    before = up.state.pids
    os.kill(before["worker"], signal.SIGKILL)
    wait_until(lambda: up.state.pids["worker"] != before["worker"])
    assert is_running(up.state.pids["worker"])
    assert {**up.state.pids, "worker": 0} == {**before, "worker": 0}
    wait_until(lambda: "worker had died and was started again" in up.said)


def test_a_stack_whose_state_cannot_be_written_goes_on_and_writes_it_at_the_next_round(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local.supervisor._DELAYS_SECONDS", (0.0,))
    stack = LocalStack(tmp_path, registry_path=registry, servers=ExternalServers(tmp_path))
    died = stack._supervisor.start(ProcessSpec("weak", [sys.executable, "-c", ""]))
    try:
        wait_until(lambda: not died.is_alive)
        in_the_way = tmp_path / "stack.json.new"
        in_the_way.mkdir()
        assert stack.restart_dead() == ("weak",)
        assert not (tmp_path / "stack.json").exists()
        in_the_way.rmdir()
        stack.restart_dead()
        assert StackState.read(tmp_path).pids == stack._supervisor.pids
    finally:
        stack._supervisor.stop()


READER = """
import json, sys
read = []
for pid in sys.argv[1:]:
    for name in ("environ", "mem"):
        try:
            open(f"/proc/{pid}/{name}", "rb").close()
            read.append(pid)
        except PermissionError:
            pass
print(json.dumps(read))
"""


def test_no_process_that_holds_a_password_can_be_read_by_another_of_its_user(registry: Path, tmp_path: Path) -> None:
    # Root goes without its rights to read any process, so that nothing but the holders' own doing is in its way.
    prefix = ("setpriv", "--bounding-set=-sys_ptrace,-perfmon,-sys_admin") if os.geteuid() == 0 else ()
    env = {"ESPALIER_API_PROCESSES": "2"}
    with run_up(tmp_path / "data", registry, env=env, prefix=prefix) as running:
        pids = running.state.pids
        api = [pids["api"], *(child.pid for child in psutil.Process(pids["api"]).children() if is_serving(child))]
        assert len(api) == 3
        holders = [running.process.pid, *api, pids["worker"], pids["schedule"]]
        argv = [*prefix, sys.executable, "-c", READER, *map(str, holders)]

        def read() -> list[str]:
            found: list[str] = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
            return found

        wait_until(lambda: not read())  # the last of the API's children may still be starting


def is_serving(child: psutil.Process) -> bool:
    return "spawn_main" in " ".join(child.cmdline())


@pytest.mark.skipif(os.geteuid() != 0, reason="who holds a password hides its environment from all but root")
def test_who_serves_holds_its_own_password_only(up: Up) -> None:
    secrets = json.loads((up.data_dir / "secrets.json").read_text())
    for name in ("api", "worker", "schedule"):
        held = Path(f"/proc/{up.state.pids[name]}/environ").read_text()
        assert f"postgresql://espalier_{name}:{secrets[name]}@" in held
        others = {"postgres", "api", "worker", "schedule"} - {name}
        assert not [other for other in others if secrets[other] in held]


def test_a_second_up_is_refused_and_told_who_is_first(up: Up, registry: Path) -> None:
    assert f"is in use by process {up.process.pid}" in fail_up("--data-dir", up.data_dir, "--registry", registry)
    assert espalier("status", "--data-dir", up.data_dir).exit_code == 0


def test_what_down_stopped_comes_back_with_its_key_and_leaves_nothing_when_killed(
    registry: Path, tmp_path: Path
) -> None:
    with run_up(tmp_path / "data dir", registry) as first:
        everything = first.everything()
        assert len(everything) >= 7
        assert espalier("down", "--data-dir", first.data_dir).exit_code == 0
        assert not any(map(is_running, everything))
        assert first.process.wait() == 0
        api_key = first.api_key
    with run_up(tmp_path / "data dir", registry) as second:
        assert list_models(second.state.api_url, api_key).is_success
        assert second.api_key == api_key
        everything = second.everything()
        second.process.kill()
        wait_until(lambda: not any(map(is_running, everything)))
    assert find_launcher(tmp_path / "data dir") is None


def test_what_killed_processes_have_left_in_the_temporary_directory_goes_with_the_next_start(
    registry: Path, tmp_path: Path
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    env = {"TMPDIR": str(place), "ESPALIER_API_PROCESSES": "2"}
    with run_up(tmp_path / "data", registry, env=env) as killed:
        everything = killed.everything()
        for pid in everything:
            with suppress(ProcessLookupError):  # the death of another may have been its own
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, everything)))
    assert list(place.glob("espalier-api-*")), "nothing was left that could go"
    with run_up(tmp_path / "data", registry, env=env) as following:
        assert espalier("down", "--data-dir", following.data_dir).exit_code == 0
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", ["redis", "s3", "postgres"])
def test_a_server_that_died_is_started_again_beside_the_rest_and_up_and_status_say_so(up: Up, name: str) -> None:
    before = up.state.pids
    os.kill(before[name], signal.SIGKILL)
    wait_until(lambda: up.state.pids[name] != before[name])
    assert {key for key in before if up.state.pids[key] != before[key]} == {name}
    wait_until(lambda: f"{name} had died and was started again" in up.said)
    wait_until(lambda: espalier("status", "--data-dir", up.data_dir).exit_code == 0)
    assert re.search(rf"^ +{name} +{up.state.pids[name]} +runs$", status_of(up), re.MULTILINE)
    wait_until(lambda: list_models(up.state.api_url, up.api_key).is_success)
    assert up.process.poll() is None


def test_ctrl_c_while_it_starts_leaves_nothing(registry: Path, tmp_path: Path) -> None:
    argv = [*ESPALIER, "up", "--data-dir", str(tmp_path / "data"), "--registry", str(registry), "--port", "0"]
    with subprocess.Popen(argv, env=clean(), stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: (tmp_path / "data" / "logs" / "s3.log").exists())
        everything = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate()
    assert "Stopped before it was up." in told
    assert process.returncode == 0
    # What it was just about to start is ended by the kernel, a moment after the launcher.
    wait_until(lambda: not any(map(is_running, everything)))
    assert find_launcher(tmp_path / "data") is None


def test_a_taken_port_is_refused_before_anything_starts(registry: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        stack = LocalStack(tmp_path / "data", api_port=port, registry_path=registry, is_durable=False)
        with pytest.raises(PortTakenError, match=f"Port {port} is taken"), stack:
            pass
    assert not (tmp_path / "data" / "secrets.json").exists()
