"""Threads and duties that live, die or are overdue."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from core.telemetry.liveness import Liveness
from tests.waiting import wait_until

FAILING = """
import threading
from core.telemetry.liveness import PROCESS
from core.telemetry.logs import configure_logs

configure_logs("schedule")
waiting = threading.Thread(target=threading.Event().wait)  # not a daemon: an interpreter that ends would wait for it
waiting.start()
PROCESS.start_thread(lambda: 1 / 0, name="cleaning")
waiting.join()
"""


@pytest.mark.fault(58)
def test_a_thread_that_fails_ends_its_process_though_others_wait_and_the_log_says_which() -> None:
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = (json.loads(each) for each in done.stderr.splitlines())
    assert (line["event"], line["thread"], line["level"]) == ("thread.failed", "cleaning", "critical")
    assert "ZeroDivisionError" in line["exception"]


def wait_for(event: threading.Event) -> None:
    event.wait()


def test_a_process_is_sound_while_its_threads_live_and_its_duties_are_done() -> None:
    liveness, is_over = Liveness(), threading.Event()
    thread = liveness.start_thread(lambda: wait_for(is_over), name="reading")
    liveness.add_duty("sweeping", patience_seconds=3600)
    assert liveness.find_fault() is None
    assert liveness.names == ("thread 'reading'", "sweeping")
    liveness.release(thread)
    is_over.set()
    thread.join()


def test_a_dead_thread_is_named() -> None:
    liveness = Liveness()
    liveness.start_thread(lambda: None, name="reading").join()
    assert liveness.find_fault() == "thread 'reading' is dead"


def test_a_thread_that_ends_as_it_should_is_missed_by_nobody() -> None:
    liveness = Liveness()
    thread = liveness.start_thread(lambda: None, name="reading")
    liveness.release(thread)
    thread.join()
    assert liveness.find_fault() is None


def test_a_duty_is_overdue_until_it_is_done_again() -> None:
    liveness = Liveness()
    duty = liveness.add_duty("sweeping", patience_seconds=0.05)
    wait_until(lambda: liveness.find_fault() is not None)
    assert str(liveness.find_fault()).startswith("sweeping is overdue: no sign of life for ")
    duty._patience_seconds = 3600
    duty.beat()
    assert liveness.find_fault() is None


def test_a_duty_that_waits_for_work_may_wait_for_ever() -> None:
    liveness = Liveness()
    duty = liveness.add_duty("reading back artifacts", patience_seconds=-1)
    assert liveness.find_fault() is not None
    duty.rest()
    assert liveness.find_fault() is None
    duty.beat()
    assert liveness.find_fault() is not None


def test_a_check_is_asked_each_time() -> None:
    liveness, faults = Liveness(), [None, "the loop does not turn"]
    liveness.add_check("the loop", lambda: faults[-1])
    assert liveness.find_fault() == "the loop does not turn"
    faults.pop()
    assert liveness.find_fault() is None
