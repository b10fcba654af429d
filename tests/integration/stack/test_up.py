"""The output of `espalier up` and `espalier status`, for people and for programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.commands.stack import find_program
from tests.integration.stack.running import BASE_MODEL, ESPALIER, Up, clean, espalier, list_models
from tests.waiting import wait_until


def test_up_says_once_that_a_base_cannot_be_used_and_why_before_any_job(up: Up) -> None:
    wait_until(lambda: "is unusable" in up.said)
    assert up.said.count(f"{BASE_MODEL} is unusable, because There is no base model at /nowhere.") == 1


def test_up_prints_a_url_and_a_key_that_a_client_can_use_at_once(up: Up) -> None:
    assert f"{up.state.api_url}/v1" in up.said
    answer = list_models(up.state.api_url, up.api_key)
    assert [model["id"] for model in answer.json()["data"]] == [BASE_MODEL]


def test_what_up_says_in_a_file_is_folded_and_not_cut(up: Up) -> None:
    panel = [line for line in up.said.splitlines() if line.startswith("│")]
    assert {len(line) for line in panel} <= set(range(101))
    assert all(line.endswith("│") for line in panel)
    told = " ".join(line.strip("│ ") for line in panel)
    assert "stops everything; the data stay." in told


def test_where_the_path_does_not_lead_to_the_command_line_it_is_said_how_to_call_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / ".venv" / "bin" / "espalier"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_program() == f"The command line is {program}."
    monkeypatch.chdir(tmp_path)
    assert find_program() == "The command line is .venv/bin/espalier, from this directory."
    monkeypatch.setenv("PATH", str(program.parent))
    assert find_program() is None


def test_status_names_every_process(up: Up) -> None:
    done = espalier("status", "--data-dir", up.data_dir)
    assert done.exit_code == 0, done.stdout
    assert f"launcher {up.process.pid}" in done.stdout
    for name in ("s3", "redis", "postgres", "api", "worker", "schedule"):
        assert re.search(rf"^ +{name} +{up.state.pids[name]} +runs$", done.stdout, re.MULTILINE)


def test_up_tells_a_program_what_it_tells_people(registry: Path, tmp_path: Path) -> None:
    argv = [*ESPALIER, "up", "--json", "--data-dir", str(tmp_path / "data"), "--registry", str(registry), "--port", "0"]
    with subprocess.Popen(argv, env=clean(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert (told["event"], told["logs"]) == ("up", str(tmp_path / "data" / "logs"))
        assert list_models(told["base_url"].removesuffix("/v1"), told["api_key"]).is_success
        refused = subprocess.run(argv, env=clean(), capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "message" in json.loads(refused.stdout)["error"]
        process.terminate()
        assert [json.loads(line) for line in process.stdout] == [{"event": "stopping"}]
    assert process.returncode == 0


def test_nothing_runs_where_nothing_was_started(tmp_path: Path) -> None:
    for words in (("status",), ("tenants", "create", "acme")):
        done = espalier(*words, "--data-dir", tmp_path / "empty")
        assert done.exit_code == 1
        assert "run" in done.stderr
    assert espalier("down", "--data-dir", tmp_path / "empty").exit_code == 0
    assert not (tmp_path / "empty").exists()
