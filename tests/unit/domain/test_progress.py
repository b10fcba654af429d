"""When a job may end, by the times of its last steps."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import pytest

from core.domain.progress import StepMark, estimate_finish, measure_progress, measure_steps

START = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)


def at(seconds: float) -> dt.datetime:
    return START + dt.timedelta(seconds=seconds)


def marks(instants: Sequence[dt.datetime]) -> list[StepMark]:
    return [StepMark(step, instant) for step, instant in enumerate(instants, start=1)]


def test_one_step_says_nothing() -> None:
    assert measure_steps([]) is None
    assert measure_steps(marks([START])) is None


def test_a_few_steps_give_a_wide_interval() -> None:
    times = measure_steps(marks([at(0), at(2), at(4)]))
    assert times is not None
    estimate = estimate_finish(times, remaining_steps=10, last_step_at=at(4), now=at(5))
    assert estimate.finish_at == at(24)
    assert (estimate.interval.earliest, estimate.interval.latest) == (at(14), at(44))


def test_the_interval_is_of_the_fastest_and_the_slowest_stretch() -> None:
    """Eight steps of 1 s, eight of 3 s, eight of 2 s."""
    seconds = [1.0] * 8 + [3.0] * 8 + [2.0] * 8
    instants = [at(sum(seconds[:count])) for count in range(len(seconds) + 1)]
    times = measure_steps(marks(instants))
    assert times is not None
    assert times.mean_seconds == pytest.approx(2.0)
    assert (times.fast_seconds, times.slow_seconds, times.num_measured) == (1.0, 3.0, 24)


def test_steps_that_were_recorded_in_bursts_are_measured_by_their_stretches() -> None:
    instants = [at(8 * (index // 8) + 0.001 * (index % 8)) for index in range(33)]
    times = measure_steps(marks(instants))
    assert times is not None
    assert times.mean_seconds == pytest.approx(1.0, rel=0.01)
    assert [times.fast_seconds, times.slow_seconds] == pytest.approx([1.0, 1.0], rel=0.01)


def test_a_late_job_is_never_said_to_have_ended_already() -> None:
    times = measure_steps(marks([at(0), at(1)]))
    assert times is not None
    estimate = estimate_finish(times, remaining_steps=1, last_step_at=at(1), now=at(100))
    assert estimate.finish_at == estimate.interval.earliest == estimate.interval.latest == at(100)


def test_a_step_that_was_skipped_takes_its_time_although_it_has_no_mark() -> None:
    """Steps of 2 s, of which every third is skipped: the gaps are two steps long, not one slow step."""
    seen = [StepMark(step, at(2.0 * step)) for step in range(60) if step % 3]
    times = measure_steps(seen)
    assert times is not None
    assert (times.mean_seconds, times.fast_seconds, times.slow_seconds, times.num_measured) == (2.0, 2.0, 2.0, 58)


def test_a_job_that_has_succeeded_is_done_whatever_was_counted() -> None:
    assert measure_progress("succeeded", trained_steps=9, total_steps=10) == 1.0
    assert measure_progress("running", trained_steps=9, total_steps=10) == 0.9
    assert measure_progress("queued", trained_steps=0, total_steps=0) == 0.0
