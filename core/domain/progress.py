"""How far a job is and when it may end, from the times at which its last steps were recorded.

The estimate uses the mean of these step times. The interval uses the fastest and the slowest stretch among them. It
extrapolates the recent past and is not a confidence interval: it cannot know which jobs will join the base's steps
later, nor how long the upload of the adapter takes.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from core.domain.jobs import JobStatus

MEASURED_STEPS = 65
_STRETCH_STEPS = 8
# Until there are two stretches to compare, steps are assumed to take between half and twice as long.
_UNSURE = (0.5, 2.0)


@dataclass(frozen=True)
class Interval:
    earliest: dt.datetime
    latest: dt.datetime


@dataclass(frozen=True)
class StepMark:
    """When a step's numbers were recorded."""

    step: int
    at: dt.datetime


@dataclass(frozen=True)
class StepTimes:
    """How long a step takes: on average, and in the fastest and the slowest stretch."""

    mean_seconds: float
    fast_seconds: float
    slow_seconds: float
    num_measured: int


@dataclass(frozen=True)
class Estimate:
    finish_at: dt.datetime
    interval: Interval
    num_measured: int


def measure_progress(status: str, *, trained_steps: int, total_steps: int) -> float:
    """Return the part of a job that is done, 0 to 1. A job that has succeeded counts as done, whatever was counted."""
    if status == JobStatus.SUCCEEDED:
        return 1.0
    return min(1.0, trained_steps / max(1, total_steps))


def measure_steps(marks: Sequence[StepMark]) -> StepTimes | None:
    """Return the step times between marks in order, or None for fewer than two marks.

    Marks may be several steps apart, because skipped steps have none.
    """
    if len(marks) < 2:  # noqa: PLR2004
        return None
    mean = _seconds_a_step(marks)
    stretches = [
        _seconds_a_step(marks[end - _STRETCH_STEPS : end + 1])
        for end in range(len(marks) - 1, _STRETCH_STEPS - 1, -_STRETCH_STEPS)
    ]
    num_measured = marks[-1].step - marks[0].step
    if len(stretches) < 2:  # noqa: PLR2004
        return StepTimes(mean, mean * _UNSURE[0], mean * _UNSURE[1], num_measured)
    return StepTimes(mean, min(stretches), max(stretches), num_measured)


def _seconds_a_step(marks: Sequence[StepMark]) -> float:
    """Return the seconds for one step between the first mark and the last. A clock that was set back gives 0."""
    seconds = sum(max(0.0, (later.at - earlier.at).total_seconds()) for earlier, later in pairwise(marks))
    return seconds / (marks[-1].step - marks[0].step)


def estimate_finish(times: StepTimes, *, remaining_steps: int, last_step_at: dt.datetime, now: dt.datetime) -> Estimate:
    """Return when the last step may be done. Never before `now`, even if the job is late."""

    def finish(seconds_a_step: float) -> dt.datetime:
        return max(now, last_step_at + dt.timedelta(seconds=seconds_a_step * remaining_steps))

    interval = Interval(finish(times.fast_seconds), finish(times.slow_seconds))
    return Estimate(finish(times.mean_seconds), interval, times.num_measured)
