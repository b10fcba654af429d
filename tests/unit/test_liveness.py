"""What is alive, what is dead and what is overdue."""

from __future__ import annotations

import threading

from core.telemetry.liveness import Liveness
from tests.waiting import wait_until


def test_a_process_is_sound_while_its_threads_live_and_its_duties_are_done() -> None:
    liveness, is_over = Liveness(), threading.Event()
    thread = threading.Thread(target=is_over.wait, name="reading", daemon=True)
    liveness.watch(thread)
    assert liveness.find_fault() is None, "a thread that is about to be started is not dead"
    thread.start()
    liveness.add_duty("sweeping", patience_seconds=3600)
    assert liveness.find_fault() is None
    assert liveness.names == ("thread 'reading'", "sweeping")
    is_over.set()


def test_a_dead_thread_is_named() -> None:
    liveness = Liveness()
    thread = threading.Thread(target=lambda: None, name="reading")
    liveness.watch(thread)
    thread.start()
    thread.join()
    assert liveness.find_fault() == "thread 'reading' is dead"


def test_a_thread_that_ends_as_it_should_is_missed_by_nobody() -> None:
    liveness = Liveness()
    thread = threading.Thread(target=lambda: None, name="reading")
    liveness.watch(thread)
    thread.start()
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
