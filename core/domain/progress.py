"""How far a job is and when it may end, from the times at which its last steps were recorded.

The estimate is the mean of those step times; the interval is what the fastest and the slowest stretch among them would
give. It is an extrapolation of the recent past, not a confidence interval: what other jobs join the base's steps later,
and how long the adapter's upload takes, nobody knows.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

MEASURED_STEPS = 65
_STRETCH_STEPS = 8
# Before there are two stretches to compare, the steps to come may well be half or twice as long.
_UNSURE = (0.5, 2.0)


@dataclass(frozen=True)
class Interval:
    earliest: dt.datetime
    latest: dt.datetime


@dataclass(frozen=True)
class StepTimes:
    """Seconds a step takes: on average, and in the fastest and the slowest stretch that was measured."""

    mean: float
    fast: float
    slow: float
    num_measured: int


@dataclass(frozen=True)
class Estimate:
    finish_at: dt.datetime
    interval: Interval
    num_measured: int


def measure_steps(recorded_at: Sequence[dt.datetime]) -> StepTimes | None:
    """Return the step times between instants in order, or None where there are fewer than two."""
    seconds = [max(0.0, (later - earlier).total_seconds()) for earlier, later in pairwise(recorded_at)]
    if not seconds:
        return None
    mean = fmean(seconds)
    stretches = [
        fmean(seconds[end - _STRETCH_STEPS : end]) for end in range(len(seconds), _STRETCH_STEPS - 1, -_STRETCH_STEPS)
    ]
    if len(stretches) < 2:  # noqa: PLR2004
        return StepTimes(mean, mean * _UNSURE[0], mean * _UNSURE[1], len(seconds))
    return StepTimes(mean, min(stretches), max(stretches), len(seconds))


def estimate_finish(times: StepTimes, *, remaining_steps: int, last_step_at: dt.datetime, now: dt.datetime) -> Estimate:
    """Return when the last step may be done; never before now, however late it already is."""

    def finish(seconds_a_step: float) -> dt.datetime:
        return max(now, last_step_at + dt.timedelta(seconds=seconds_a_step * remaining_steps))

    interval = Interval(finish(times.fast), finish(times.slow))
    return Estimate(finish(times.mean), interval, times.num_measured)
