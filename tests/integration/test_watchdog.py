"""The watchdog of a worker that gets no wake-ups: on real servers, with a runner that only the watchdog calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from sqlalchemy import Engine

from core.queue import WakeUpPublisher, queue_name
from core.settings import WorkerSettings
from core.telemetry.liveness import Liveness
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.bases import POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.supervisors import running_runner, worker_settings
from tests.waiting import wait_until
from worker.supervisor.watchdog import Watchdog

NOBODY = "redis://127.0.0.1:1/0"


@pytest.fixture
def settings(database: Database, servers: ServerAddresses, tmp_path: Path) -> WorkerSettings:
    return worker_settings(database, servers, tmp_path, worker_name="watched", cache_dir=tmp_path, deaf_seconds=0.3)


@pytest.mark.fault(11)
def test_row_11_a_worker_whose_consumer_takes_no_wake_up_ends_to_be_started_afresh(
    settings: WorkerSettings, servers: ServerAddresses, owner: Engine, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    with WakeUpPublisher(servers.redis_url) as publisher:
        publisher.publish(POOL)
    codes: list[int] = []
    with running_runner(settings) as runner:

        def end_process(code: int) -> None:
            codes.append(code)
            runner.request_stop()  # this process goes on: nothing is to be served in it

        Watchdog(settings, runner, end_process=end_process).start()
        wait_until(lambda: bool(codes))
        assert set(codes) == {1}
        with redis.Redis.from_url(servers.redis_url) as client:
            client.delete(queue_name(POOL))


def test_a_wake_up_that_has_just_come_is_no_sign_of_a_deaf_consumer(
    settings: WorkerSettings, servers: ServerAddresses, owner: Engine, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    codes: list[int] = []
    with (
        running_runner(settings) as runner,
        WakeUpPublisher(servers.redis_url) as publisher,
        redis.Redis.from_url(servers.redis_url) as client,
    ):
        runner.request_stop()  # nothing is to be served in this process
        watchdog = Watchdog(settings, runner, end_process=codes.append)
        wait_until(lambda: runner.idle_seconds > settings.deaf_seconds)
        for number in range(2, 4):
            publisher.publish(POOL)
            watchdog.heed_silence()
            client.delete(queue_name(POOL))  # the consumer takes it
            watchdog.heed_silence()
            wait_until(lambda number=number: runner.idle_seconds > number * settings.deaf_seconds)  # type: ignore[misc]
    assert codes == []


def test_a_worker_is_sound_while_the_watchdog_itself_serves(
    settings: WorkerSettings, owner: Engine, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    settings = settings.model_copy(update={"redis_url": type(settings.redis_url)(NOBODY)})
    liveness, codes = Liveness(), list[int]()
    with running_runner(settings) as runner:
        Watchdog(settings, runner, liveness=liveness, end_process=codes.append).start()
        wait_until(lambda: runner.describe().state == "loading")
        assert liveness.names == ("heeding silence", "the loop that serves", "thread 'watchdog'")
        assert liveness.find_fault() is None
    assert codes == []


def test_a_loop_that_does_not_turn_is_named(settings: WorkerSettings) -> None:
    liveness = Liveness()
    with running_runner(settings.model_copy(update={"stall_seconds": 0.1})) as runner:
        # The watchdog's thread stays after this test. A runner that has been stopped serves no other test's jobs.
        Watchdog(settings, runner, liveness=liveness, end_process=list[int]().append).start()
        with runner._serving:  # somebody serves, and never comes round
            wait_until(lambda: liveness.find_fault() == "the loop that serves jobs does not turn")
        assert liveness.find_fault() is None
