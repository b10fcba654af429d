"""Why a job waits: one code, for the first thing that must change."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any

import pytest

from core.domain.outlook import (
    PoolQueue,
    PoolWorkers,
    TenantState,
    WaitCode,
    WaitingJob,
    estimate_wait,
    explain_wait,
)

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
JOB = WaitingJob(is_paused=False, run_after=NOW, total_steps=100, last_outcome=None)
TENANT = TenantState(num_running=0, max_running=8, is_disabled=False)
WORKERS = PoolWorkers(
    num_alive=2, num_serving=2, num_loading=0, num_elsewhere=0, slots=8, slots_in_use=8, last_seen_at=NOW
)
QUEUE = PoolQueue(20, 12, 0.5, 0.25, 9, job_seconds=(60.0, 300.0), step_seconds=(0.5, 2.0))


def seconds(number: float) -> dt.timedelta:
    return dt.timedelta(seconds=number)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"is_paused": True, "is_disabled": True}, WaitCode.PAUSED, "resume it"),
        ({"is_disabled": True, "num_running": 8}, WaitCode.TENANT_DISABLED, "operator"),
        ({"is_base_unusable": True, "is_disabled": True}, WaitCode.TENANT_DISABLED, "operator"),
        ({"is_base_unusable": True, "run_after": NOW + seconds(4)}, WaitCode.BASE_UNUSABLE, "loses no attempt"),
        ({"num_alive": 0, "num_unfit": 2}, WaitCode.NO_WORKER, "2 workers that may serve this base model are alive"),
        ({"num_alive": 0, "num_clock_wrong": 2, "num_unfit": 1}, WaitCode.CLOCK_WRONG, "The clocks of 2 workers"),
        ({"num_alive": 1, "num_clock_wrong": 2}, WaitCode.NO_FREE_SLOT, "8 of 8 slots"),
        ({"run_after": NOW + seconds(4.2), "num_alive": 0}, WaitCode.RETRY_BACKOFF, "in 5 s"),
        ({"num_running": 8, "num_alive": 0}, WaitCode.TENANT_CONCURRENCY, "8 of your jobs are running and 8 may"),
        ({"num_alive": 0, "last_seen_at": NOW - seconds(90)}, WaitCode.NO_WORKER, "90 s ago"),
        ({"num_alive": 0, "last_seen_at": None}, WaitCode.NO_WORKER, "none has been seen"),
        ({"num_serving": 0, "num_loading": 1}, WaitCode.BASE_LOADING, "loading"),
        ({"num_serving": 0, "num_elsewhere": 1}, WaitCode.BASE_LOADING, "about to"),
        ({"num_serving": 0, "num_elsewhere": 2}, WaitCode.OTHER_BASE_TURN, "turn of another"),
        ({"num_serving": 0, "num_elsewhere": 2, "turn_left_seconds": 90.0}, WaitCode.OTHER_BASE_TURN, "in 2 min"),
        ({"last_outcome": "lent"}, WaitCode.SLOT_LENT, "is lent to an organization that has used less"),
        ({"last_outcome": "lent", "num_serving": 0, "num_elsewhere": 2}, WaitCode.OTHER_BASE_TURN, "turn of another"),
        ({"slots_in_use": 7, "num_ahead": 0}, WaitCode.STARTING, "this job's turn"),
        ({"slots_in_use": 7, "num_ahead": 1}, WaitCode.NO_FREE_SLOT, "7 of 8 slots are in use, and 1 jobs"),
        ({"last_outcome": "preempted"}, WaitCode.PREEMPTED, "gave it back"),
        ({"last_outcome": "preempted", "num_alive": 0}, WaitCode.NO_WORKER, "alive"),
        ({}, WaitCode.NO_FREE_SLOT, "8 of 8 slots are in use, and 12 jobs come first"),
    ],
)
def test_a_wait_has_one_reason(changes: dict[str, Any], code: WaitCode, words: str) -> None:
    def changed(value: Any) -> Any:
        fields = {field.name for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: changes[name] for name in fields & changes.keys()})

    reason = explain_wait(changed(JOB), tenant=changed(TENANT), workers=changed(WORKERS), queue=changed(QUEUE), now=NOW)
    assert reason.code == code
    assert words in reason.sentence


def eta(*, queue: PoolQueue = QUEUE, workers: PoolWorkers = WORKERS, job: WaitingJob = JOB) -> Any:
    reason = explain_wait(job, tenant=TENANT, workers=workers, queue=queue, now=NOW)
    return estimate_wait(job, reason=reason, workers=workers, queue=queue, now=NOW)


def test_an_estimate_begins_when_a_slot_comes_free_and_counts_jobs_beyond_those_that_run_in_waves() -> None:
    """13 jobs must leave 8 slots: 8 that run, then a wave of those that are ahead."""
    queue = dataclasses.replace(QUEUE, num_running=8, leave_seconds=(30.0, 500.0))
    interval = eta(queue=queue)
    assert interval.earliest == NOW + seconds(30 + 60 + 50)
    assert interval.latest == NOW + seconds(500 + 300 + 200)


def test_a_job_behind_those_that_run_waits_for_their_remaining_steps_alone() -> None:
    queue = dataclasses.replace(QUEUE, num_ahead=2, num_running=8, leave_seconds=(1e6, 2e6))
    interval = eta(queue=queue)
    assert (interval.earliest, interval.latest) == (NOW + seconds(1e6 + 50), NOW + seconds(2e6 + 200))


def test_a_job_whose_turn_it_is_takes_its_own_steps_only() -> None:
    interval = eta(queue=dataclasses.replace(QUEUE, num_ahead=0), workers=dataclasses.replace(WORKERS, slots_in_use=0))
    assert (interval.earliest, interval.latest) == (NOW + seconds(50), NOW + seconds(200))


def test_a_base_without_a_worker_waits_for_the_end_of_a_turn_and_a_load() -> None:
    queue = dataclasses.replace(QUEUE, num_ahead=0, load_seconds=40.0)
    away = dataclasses.replace(WORKERS, num_serving=0, num_elsewhere=2, turn_left_seconds=300.0)
    interval = eta(queue=queue, workers=away)
    assert (interval.earliest, interval.latest) == (NOW + seconds(40 + 50), NOW + seconds(300 + 40 + 200))
    assert eta(queue=dataclasses.replace(queue, is_fairest=False), workers=away) is None, "others' turn may go on"
    loading = dataclasses.replace(away, num_loading=1)
    assert eta(queue=queue, workers=loading).latest == NOW + seconds(40 + 200)
    assert eta(queue=dataclasses.replace(queue, load_seconds=None), workers=loading) is None


def test_nothing_is_said_of_a_job_whose_slot_may_be_lent_or_that_waits_for_what_nobody_has_measured() -> None:
    long = dataclasses.replace(JOB, total_steps=1000)  # 2,000 s at the slowest
    assert eta(job=long) is not None
    assert eta(job=long, queue=dataclasses.replace(QUEUE, num_rivals=1)) is None
    assert eta(queue=dataclasses.replace(QUEUE, num_rivals=1)) is not None, "it ends within its quantum"
    assert eta(queue=dataclasses.replace(QUEUE, leave_seconds=(0.0, None))) is None


def test_nothing_is_guessed_without_measurements_or_workers() -> None:
    assert eta(queue=dataclasses.replace(QUEUE, job_seconds=None)) is None
    assert eta(workers=dataclasses.replace(WORKERS, num_alive=0)) is None
    assert eta(job=dataclasses.replace(JOB, is_paused=True)) is None
