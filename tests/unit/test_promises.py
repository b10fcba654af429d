"""The seconds promised in docs/contract.md and docs/tenancy.md, from the settings and constants that keep them.

Other tests check on real processes that the promised things happen, and wait as long as a busy machine takes.
"""

from __future__ import annotations

import pytest

from api import auth, feeds, rate_limits
from core.settings import ScheduleSettings, WorkerSettings
from worker.supervisor import lease
from worker.trainer import transfers

SCHEDULE = ScheduleSettings.model_construct()
WORKER = WorkerSettings.model_construct()

PROMISES = {
    "a dead worker's job is queued again": (65, WORKER.lease_seconds + SCHEDULE.reap_interval_seconds),
    "a worker stops itself before another may start its job": (
        WORKER.lease_seconds * 3 / 4,
        WORKER.lease_seconds * lease._SELF_FENCE_FRACTION + WORKER.lease_seconds / lease._LOOKS_PER_LEASE,
    ),
    "a lost wake-up is made good": (5, SCHEDULE.wake_interval_seconds),
    "another schedule leads": (10, SCHEDULE.leader_lease_seconds + SCHEDULE.wake_interval_seconds),
    "a cancelled job's device is free": (10, WORKER.heartbeat_seconds),
    "a revoked key is refused": (5, auth.TTL_SECONDS),
    "the stream of a revoked key ends": (5, feeds.SWEEP_SECONDS),
    "a request waits for a Redis that hangs": (0.3, rate_limits._TIMEOUT_SECONDS),
    "a trainer waits for an object store that hangs": (15, transfers._TIMEOUT.read),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_the_settings_as_they_come_keep_what_is_promised(promise: str) -> None:
    promised_seconds, seconds = PROMISES[promise]
    assert seconds is not None
    assert seconds <= promised_seconds
