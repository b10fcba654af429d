"""A job's pauses between attempts."""

from __future__ import annotations

from core.domain.jobs import MAX_UNCOUNTED, retry_delay_seconds


def test_pauses_grow_with_attempts_that_count_and_with_those_that_do_not() -> None:
    assert [retry_delay_seconds(counted) for counted in range(4)] == [5.0, 5.0, 30.0, 30.0]
    uncounted = [retry_delay_seconds(0, num_uncounted=num) for num in range(MAX_UNCOUNTED + 1)]
    assert uncounted[:6] == [5.0, 5.0, 10.0, 20.0, 40.0, 80.0]
    assert uncounted[-1] == 600.0
    assert retry_delay_seconds(2, num_uncounted=1) == 30.0
