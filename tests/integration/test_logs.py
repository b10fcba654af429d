"""A process's log is JSON line by line, whatever it writes and however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE_SECONDS

PROGRAM = """
import atexit, logging, os, subprocess, sys, threading, warnings
import structlog
from core.telemetry.logs import configure_logs, find_log_file
configure_logs("probe")
log = structlog.get_logger()
{body}
"""


def run(body: str) -> tuple[list[dict[str, Any]], int]:
    """Return what a process logs that does this, and its exit status."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)], capture_output=True, text=True, check=False
    )
    assert not done.stdout
    return [json.loads(line) for line in done.stderr.splitlines()], done.returncode


def test_what_is_printed_by_anybody_is_wrapped() -> None:
    lines, _ = run("""
print("from Python"); sys.stdout.flush()
os.write(2, b"from C\\r50%\\n")
subprocess.run([sys.executable, "-c", "print('from a child')"])
os.write(1, b"without an end")
""")
    assert [line["line"] for line in lines] == ["from Python", "from C\r50%", "from a child", "without an end"]
    assert {line["event"] for line in lines} == {"output.printed"}
    assert {line["process"] for line in lines} == {"probe"}


def test_what_is_json_already_passes_as_it_is() -> None:
    lines, _ = run("""os.write(1, b'{"event": "child.said"}\\n'); os.write(1, b'{"event"\\n')""")
    assert lines[0] == {"event": "child.said"}
    assert lines[1]["line"] == '{"event"'


def test_libraries_and_warnings_are_rendered_alike() -> None:
    lines, _ = run("""
logging.getLogger("celery").warning("Connected to %s", "nobody")
warnings.warn("old", DeprecationWarning, stacklevel=1); warnings.warn("odd", stacklevel=1)
log.info("job.claimed", lease_token=1)
""")
    assert [line["level"] for line in lines] == ["warning", "warning", "warning", "info"]
    assert lines[0]["event"] == "Connected to nobody"
    assert lines[3]["lease_token"] == 1


def test_a_log_on_a_full_disk_stops_nobody() -> None:
    body = """
for _ in range(3000):
    log.info("job.claimed", lease_token=1)
    os.write(1, b"from C\\n")
    os.write(1, b'{"event": "child.said"}\\n')
"""
    with Path("/dev/full").open("w") as full:  # more than a pipe holds, every write refused
        program = PROGRAM.format(body=body)
        done = subprocess.run([sys.executable, "-c", program], stderr=full, check=False, timeout=60)
    assert done.returncode == 0


def test_a_traceback_that_ends_the_process_is_one_line() -> None:
    (line,), status = run("raise ValueError('of ours')")
    assert (line["event"], line["level"], status) == ("process.failed", "critical", 1)
    assert "ValueError: of ours" in line["exception"]


def test_a_setting_that_is_missing_puts_no_other_into_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_DATABASE_URL", "postgresql://somebody:hunter2@nowhere/db")
    (line,), status = run("from core.settings import ScheduleSettings; ScheduleSettings()")
    assert (line["event"], status) == ("process.failed", 1)
    assert "redis_url" in line["exception"]
    assert "hunter2" not in line["exception"]


@pytest.mark.parametrize("process", ["api", "schedule", "worker"])
def test_a_process_that_cannot_read_its_settings_says_so_in_one_line(process: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("ESPALIER_")}
    env["ESPALIER_DATABASE_URL"] = "postgresql://somebody:hunter2@nowhere/db"
    env["ESPALIER_API_PROCESSES"] = "none"
    done = subprocess.run([sys.executable, "-m", process], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 1)
    (line,) = [json.loads(each) for each in done.stderr.splitlines()]
    assert (line["event"], line["process"]) == ("process.failed", process)
    assert "s3_endpoint" in line["exception"]
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("url", ["redis://:hunter2/x@nowhere:6379/0", "redis://user:hunter2#x@nowhere"])
@pytest.mark.parametrize("process", ["api", "schedule", "worker"])
def test_a_url_that_cannot_be_read_is_named_and_not_shown(process: str, url: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("ESPALIER_")}
    env["ESPALIER_DATABASE_URL"] = "postgresql://somebody@127.0.0.1:1/db"
    env["ESPALIER_S3_ENDPOINT"] = "127.0.0.1:1"
    env["ESPALIER_REDIS_URL"] = url
    done = subprocess.run([sys.executable, "-m", process], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 1)
    (line,) = [json.loads(each) for each in done.stderr.splitlines()]
    assert (line["event"], line["process"]) == ("process.failed", process)
    assert "redis_url\n  Value error, This is no URL of a Redis." in line["exception"]
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [("s3_endpoint", "host:abc"), ("s3_endpoint", "127.0.0.1:99999"), ("s3_bucket", "my..bucket")],
)
def test_a_setting_of_the_store_that_cannot_be_is_named(variable: str, value: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("ESPALIER_")}
    env["ESPALIER_DATABASE_URL"] = "postgresql://somebody@127.0.0.1:1/db"
    env["ESPALIER_REDIS_URL"] = "redis://127.0.0.1:1"
    env["ESPALIER_S3_ENDPOINT"] = "127.0.0.1:1"
    env[f"ESPALIER_{variable.upper()}"] = value
    command = [sys.executable, "-m", "schedule"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    assert done.returncode == 1
    (line,) = [json.loads(each) for each in done.stderr.splitlines()]
    assert f"{variable}\n  Value error" in line["exception"]


def test_what_is_printed_may_be_wrapped_later_than_what_is_logged() -> None:
    body = """
from core.telemetry.logs import capture_printed
configure_logs("probe", captured=()); log.info("settings.read"); capture_printed(); print("from Python")
"""
    program = PROGRAM.replace('configure_logs("probe")\n', "").format(body=body)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["settings.read", "output.printed"]


def test_a_thread_that_dies_leaves_one_line() -> None:
    (line,), _ = run("thread = threading.Thread(target=lambda: 1 / 0, name='proofs'); thread.start(); thread.join()")
    assert (line["event"], line["thread"]) == ("thread.failed", "proofs")
    assert "ZeroDivisionError" in line["exception"]


def test_a_thread_names_its_process_too() -> None:
    (line,), _ = run("thread = threading.Thread(target=lambda: log.info('job.left')); thread.start(); thread.join()")
    assert line["process"] == "probe"


def test_a_child_that_logs_by_itself_is_given_the_log() -> None:
    (line,), _ = run("""subprocess.run(["echo", '{"event": "base.loaded"}'], stdout=find_log_file())""")
    assert line == {"event": "base.loaded"}
