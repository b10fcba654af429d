"""When a worker may leave: its runner's answers, on a real database and without a trainer."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine

from core.db.session import service_transaction
from core.services import claims
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.bases import POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.supervisors import running_runner, worker_settings
from tests.waiting import wait_until
from worker.supervisor.idle_exit import IdleExit
from worker.supervisor.runner import Runner


def postpone_jobs(owner: Engine) -> None:
    """Leave nothing to claim, also of other tests."""
    with service_transaction(owner) as session:
        session.connection().exec_driver_sql("update jobs set run_after = 'infinity' where status = 'queued'")


@pytest.fixture
def runner(database: Database, servers: ServerAddresses, owner: Engine, tmp_path: Path) -> Iterator[Runner]:
    postpone_jobs(owner)
    settings = worker_settings(database, servers, tmp_path, worker_name="idler", cache_dir=tmp_path)
    with running_runner(settings) as made:
        yield made


def test_a_worker_does_not_leave_a_job_that_waits_for_it(runner: Runner, owner: Engine, tenant: Tenant) -> None:
    queue_job(owner, tenant)
    assert not runner.leave_if_idle(0)
    postpone_jobs(owner)
    assert runner.leave_if_idle(0)


def test_a_worker_whose_clock_is_wrong_does_not_leave_the_jobs_that_it_cannot_claim(
    runner: Runner, owner: Engine, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    clock = runner._clock
    assert clock.is_right()
    assert clock._reading is not None
    clock._reading = replace(clock._reading, at=clock._reading.at + dt.timedelta(hours=1))
    assert clock.is_wrong
    assert not runner.has_claimable_work()
    assert not runner.leave_if_idle(0)
    postpone_jobs(owner)
    assert runner.leave_if_idle(0)


def test_a_worker_that_has_said_it_leaves_claims_nothing_any_more(
    runner: Runner, owner: Engine, tenant: Tenant
) -> None:
    assert runner.leave_if_idle(0)
    queue_job(owner, tenant)
    runner.serve()  # what the wake-up for it does
    assert runner.describe().state == "stopping"
    with service_transaction(owner) as session:
        assert POOL in claims.claimable_pools(session), "the schedule wakes another worker for it"


def test_a_worker_that_serves_is_not_idle(runner: Runner) -> None:
    with runner._serving:
        assert not runner.leave_if_idle(0)


def test_a_worker_that_has_not_idled_for_long_stays(runner: Runner) -> None:
    assert not runner.leave_if_idle(3600)


def test_the_process_is_ended_once_and_only_when_its_runner_leaves(
    runner: Runner, owner: Engine, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    states: list[str] = []
    IdleExit(runner, idle_seconds=0.1, end_process=lambda: states.append(runner.describe().state)).start()
    postpone_jobs(owner)
    wait_until(lambda: bool(states))
    assert states == ["stopping"]
