"""One schedule leads, by the database's clock. Another takes over in time. A wrong belief to lead is harmless."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.exc import DBAPIError

from core.db.models import Job
from core.db.session import service_transaction
from core.services import attempts, leases
from core.services.leadership import lead, resign
from core.settings import ScheduleSettings
from local.servers import ServerAddresses
from tests.databases import Database, num_waiting, opened, run
from tests.factories.jobs import claim, make_claimable, queue_job, status_of
from tests.factories.tenants import Tenant
from tests.processes import leader_pid, schedule_process
from tests.waiting import wait_until

TAKEOVER_SECONDS = 10.0  # as docs/contract.md promises
LOOK_SECONDS = ScheduleSettings.model_fields["wake_interval_seconds"].default  # how often who stands by asks to lead


@pytest.fixture
def schedule(database: Database, owner: Engine) -> Iterator[Engine]:
    run(owner, "delete from leaders")
    with opened(database.schedule_url) as engine:
        yield engine


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    run(owner, "truncate jobs cascade")
    return worker


def try_to_lead(engine: Engine, holder: str, lease_seconds: float = 60) -> bool:
    with service_transaction(engine) as session:
        return lead(session, holder, lease_seconds=lease_seconds)


def test_one_leads_until_its_lease_is_over_and_then_another(schedule: Engine) -> None:
    assert try_to_lead(schedule, "a", lease_seconds=60)
    assert not try_to_lead(schedule, "b")
    assert try_to_lead(schedule, "a", lease_seconds=-1), "the leader prolongs, or shortens, its own lease"
    assert try_to_lead(schedule, "b")
    assert not try_to_lead(schedule, "a")


def test_a_leader_that_resigns_is_followed_at_once_and_only_the_leader_can_resign(schedule: Engine) -> None:
    assert try_to_lead(schedule, "a")
    with service_transaction(schedule) as session:
        resign(session, "b")
    assert not try_to_lead(schedule, "b")
    with service_transaction(schedule) as session:
        resign(session, "a")
    assert try_to_lead(schedule, "b")


@pytest.mark.parametrize("is_expired", [False, True])
def test_of_many_that_ask_at_once_one_leads(schedule: Engine, is_expired: bool) -> None:
    if is_expired:
        try_to_lead(schedule, "old", lease_seconds=-1)
    barrier = threading.Barrier(8)

    def ask(number: int) -> bool:
        barrier.wait()
        return try_to_lead(schedule, str(number))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 1


def test_nobody_takes_over_in_the_middle_of_a_leaders_transaction(schedule: Engine, database: Database) -> None:
    with service_transaction(schedule) as session:
        assert lead(session, "a", lease_seconds=-1)  # over as soon as this transaction is
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(try_to_lead, schedule, "b")
            wait_until(lambda: num_waiting(database) > 0)
            assert not asked.done()
            session.commit()
            # It began before the leader's lease was over, by its own transaction's clock; its next try succeeds.
            asked.result()
    assert try_to_lead(schedule, "b")


def test_a_leader_stopped_inside_a_transaction_loses_it_and_another_leads_within_ten_seconds(schedule: Engine) -> None:
    with pytest.raises(DBAPIError), service_transaction(schedule) as session:
        assert lead(session, "stopped", lease_seconds=1)
        held = "select extract(epoch from current_setting('idle_in_transaction_session_timeout')::interval)"
        assert session.scalar(text(held)) <= TAKEOVER_SECONDS - LOOK_SECONDS
        wait_until(lambda: try_to_lead(schedule, "b"), what="the end of the stopped transaction")
        session.execute(select(1))


def seconds_left(owner: Engine) -> float:
    """Return how much of its lease the leader has left, by the clock that decides."""
    with service_transaction(owner) as session:
        left = "select extract(epoch from lease_until - clock_timestamp()) from leaders"
        return float(session.scalars(text(left)).one())


@pytest.mark.fault(25)
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_row_25_of_two_schedules_one_leads_and_the_other_takes_over_within_ten_seconds(
    blow: signal.Signals, owner: Engine, database: Database, servers: ServerAddresses
) -> None:
    with schedule_process(database, servers) as first, schedule_process(database, servers) as second:
        pids = {first.pid, second.pid}
        wait_until(lambda: leader_pid(owner) in pids)
        leader, other = (first, second) if leader_pid(owner) == first.pid else (second, first)
        leader.send_signal(blow)
        assert seconds_left(owner) <= TAKEOVER_SECONDS - LOOK_SECONDS
        wait_until(lambda: leader_pid(owner) == other.pid, what="another leader")
        leader.send_signal(signal.SIGCONT)


@pytest.mark.fault(25)
@pytest.mark.usefixtures("schedule")
def test_row_25_a_leader_that_is_told_to_go_does_not_let_the_other_wait_for_the_end_of_its_lease(
    owner: Engine, database: Database, servers: ServerAddresses
) -> None:
    with (
        schedule_process(database, servers, leader_lease_seconds="600") as first,
        schedule_process(database, servers, leader_lease_seconds="600") as second,
    ):
        wait_until(lambda: leader_pid(owner) in {first.pid, second.pid})
        leader, other = (first, second) if leader_pid(owner) == first.pid else (second, first)
        leader.send_signal(signal.SIGTERM)
        wait_until(lambda: leader_pid(owner) == other.pid)


@pytest.mark.fault(53)
def test_row_53_a_reaper_that_goes_on_with_a_stale_view_expires_nobodys_live_lease(
    schedule: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    lost = claim(worker, lease_seconds=-1)
    assert lost is not None
    assert try_to_lead(schedule, "stopped", lease_seconds=-1)
    with service_transaction(schedule) as stale:
        # It has seen the expired lease, and stops here; meanwhile its successor does the same duty.
        assert stale.scalar(select(Job.lease_until < func.now()).where(Job.id == lost.job_id))
        with service_transaction(owner) as session:
            assert lead(session, "next", lease_seconds=60)
            assert attempts.expire_leases(session) == 1
        make_claimable(owner, lost)
        newer = claim(worker)
        assert newer is not None
        assert not lead(stale, "stopped", lease_seconds=60)
        assert attempts.expire_leases(stale) == 0, "even a reaper that does not ask whether it leads"
    with service_transaction(worker) as session:
        leases.heartbeat(session, newer, lease_seconds=60)


@pytest.mark.fault(53)
def test_row_53_a_heartbeat_that_comes_before_the_reapers_lock_saves_the_lease(
    schedule: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    lease = claim(worker, lease_seconds=-1)
    assert lease is not None
    with service_transaction(schedule) as stale:
        assert stale.scalar(select(Job.lease_until < func.now()).where(Job.id == lease.job_id))
        with service_transaction(worker) as session:
            leases.heartbeat(session, lease, lease_seconds=60)
        assert attempts.expire_leases(stale) == 0
    assert status_of(owner, lease) == "running"
