"""Row 28: whose clock is wrong does not matter, as long as it is not the database's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from core.db.session import connect, service_transaction
from local.servers import ServerAddresses
from tests.clocks import find_faketime
from tests.integration.conftest import Database, Tenant
from tests.integration.test_attempts import claim, queue_job, status_of
from tests.integration.test_leadership import leader_pid, schedule_process
from tests.waiting import wait_until


@pytest.fixture
def worker(database: Database, owner: Engine) -> Iterator[Engine]:
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs, queues, leaders cascade"))
    engine = connect(database.worker_url)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("hours", [1, -1])
def test_row_28_a_schedule_whose_clock_is_an_hour_wrong_expires_nothing_early_and_everything_in_time(
    hours: int, worker: Engine, owner: Engine, database: Database, servers: ServerAddresses, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    queue_job(owner, tenant)
    lost, live = claim(worker, lease_seconds=1), claim(worker, lease_seconds=1800)
    assert lost is not None
    assert live is not None
    wrong = {"ld_preload": find_faketime(), "faketime": f"{hours:+d}h", "dont_fake_monotonic": "1"}
    with schedule_process(database, servers, env=wrong, reap_interval_seconds="0.2") as process:
        wait_until(lambda: leader_pid(owner) == process.pid)
        wait_until(lambda: status_of(owner, lost) == "queued")
        assert status_of(owner, live) == "running"
