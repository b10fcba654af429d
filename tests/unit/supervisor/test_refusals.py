"""A refused base is tried again at growing intervals, and at once when its row has changed since."""

from __future__ import annotations

import datetime as dt

import pytest

from worker.supervisor.refusals import Refusals

THEN = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
LATER = THEN + dt.timedelta(seconds=1)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("worker.supervisor.refusals.time.monotonic", made)
    return made


def refuse(refusals: Refusals, reason: str = "It is broken.", *, since: dt.datetime | None = THEN) -> bool:
    return refusals.add("p", reason, is_worker_fault=False, state_since=since)


def test_each_try_waits_twice_as_long_as_the_one_before_up_to_five_minutes(clock: Clock) -> None:
    refusals = Refusals()
    assert refusals.is_due("p", state_since=THEN)
    waits = []
    for _ in range(9):
        refuse(refusals)
        begun = clock.now
        while not refusals.is_due("p", state_since=THEN):
            assert refusals.standing == {"p": "It is broken."}
            clock.now += 5
        waits.append(clock.now - begun)
        assert refusals.standing == {}  # others may count on this worker again
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]


@pytest.mark.usefixtures("clock")
def test_a_row_that_has_changed_since_is_tried_at_once_and_an_older_look_at_it_is_not() -> None:
    refusals = Refusals()
    refuse(refusals)
    assert not refusals.is_due("p", state_since=THEN)
    assert not refusals.is_due("p", state_since=THEN - dt.timedelta(seconds=1))
    assert refusals.is_due("p", state_since=LATER)
    refuse(refusals, since=None)  # it could not be recorded
    assert not refusals.is_due("p", state_since=LATER)


@pytest.mark.usefixtures("clock")
def test_a_reason_is_news_once_and_what_was_loaded_begins_anew() -> None:
    refusals = Refusals()
    assert [refuse(refusals), refuse(refusals), refuse(refusals, "It is gone.")] == [True, False, True]
    refusals.add("q", "It is too large.", is_worker_fault=True, state_since=None)
    for pool in ("p", "q"):
        refusals.forget_base_fault(pool)
    assert refusals.standing == {"q": "It is too large."}
    refusals.forget("q")
    assert refusals.standing == {}
    assert refuse(refusals, "It is gone.")
