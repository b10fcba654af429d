"""The schedule's loop: wakes pools that have work, expires leases, deletes what was deleted or is too old.

| thread | what it does |
|---|---|
| clock | takes the lead; while it leads, levels new tenants in fair share, wakes pools and expires leases |
| clean | deletes expired files and idempotency keys, purges objects, erases deleted jobs and tenants |
| sweep | deletes objects that no row names, and books the usage of lost workers |
| forget | deletes rows that are older than the settings keep |

Several schedules may run. The one that holds the leader's row does the duties, the others stand by. A duty may still be
done twice, or by two schedules at once: wake-ups are hints, and expiry checks the lease again in the statement that
locks it. A notification from PostgreSQL speeds a wake-up up; the tick guarantees it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import redis
import structlog
from kombu.exceptions import OperationalError as BrokerError
from prometheus_client import REGISTRY
from sqlalchemy import Engine

from core.db.clock import DatabaseClock
from core.db.connections import Subscription
from core.db.session import DATABASE_ERRORS, ServiceSession, connect, service_transaction, state_of, took_too_long
from core.queue import WakeUpPublisher
from core.sandbox import hide_memory
from core.services.attempts import expire_leases
from core.services.charges import level_newcomer, list_newcomers
from core.services.claims import claimable_pools
from core.services.files import expire_files
from core.services.idempotency import forget_expired_keys
from core.services.jobs import WAKE_CHANNEL
from core.services.leadership import lead, resign
from core.services.readiness import find_readiness
from core.services.set_asides import forget_set_asides
from core.settings import ScheduleSettings
from core.storage import ObjectStore, S3ObjectStore, StorageError
from core.telemetry.liveness import PROCESS, Duty
from core.telemetry.logs import configure_logs
from core.telemetry.management import ManagementServer
from schedule.eraser import erase
from schedule.forgetter import days_kept, forget
from schedule.metrics import DUTY_SECONDS, LEASES_EXPIRED, OBJECTS_DELETED, POOLS_WOKEN, QueueCollector
from schedule.purger import purge
from schedule.sweeper import settle, sweep

log = structlog.get_logger()
# A suspended process whose transaction waits for the leader's row must not get the leadership when the blocking
# transaction is ended. Because of this timeout its wait has ended before that.
_LOCK_TIMEOUT_SECONDS = 2.0
# Notifications within this time after a wake-up are answered by one further wake-up. Otherwise hundreds of submissions
# a second would cause as many queries over all queues.
_GATHER_SECONDS = 0.05
# A thread that has shown no life for this long hangs. All threads wait in bounded steps, also for the database and the
# object store. The longest step of the sweep is listing one tenant's objects.
_CLOCK_PATIENCE_SECONDS = 120.0
_CLEAN_PATIENCE_SECONDS = 900.0
_SWEEP_PATIENCE_SECONDS = 3600.0
_FORGET_PATIENCE_SECONDS = 900.0
# Container runtimes kill a process 10 s after asking it to stop. Every duty may be interrupted anywhere.
_STOP_SECONDS = 7.0


class Schedule:
    """Runs each duty at its interval while it leads, until it is stopped."""

    def __init__(
        self, settings: ScheduleSettings, *, engine: Engine, store: ObjectStore, publisher: WakeUpPublisher
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store
        self._publisher = publisher
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._is_leader = False
        self._due_at: dict[Callable[[], None], float] = {}
        self._stop_requested = threading.Event()
        self._clock = PROCESS.add_duty("the clock that wakes and expires", patience_seconds=_CLOCK_PATIENCE_SECONDS)
        self._cleaning = PROCESS.add_duty("cleaning", patience_seconds=_CLEAN_PATIENCE_SECONDS)
        self._sweeping = PROCESS.add_duty("sweeping", patience_seconds=_SWEEP_PATIENCE_SECONDS)
        self._forgetting = PROCESS.add_duty("forgetting", patience_seconds=_FORGET_PATIENCE_SECONDS)

    @property
    def is_leader(self) -> bool:
        """Whether it led when it last checked."""
        return self._is_leader

    def request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stop_requested.set()

    def run(self) -> None:
        """Do the duties until told to stop. A duty still running is soon interrupted: it may be done twice.

        The threads are independent, because a hanging object store must not stop wake-ups, and cleaning and sweeping
        may each take long.
        """
        threads = [
            PROCESS.start_thread(self._keep_time, name=self._clock.name),
            self._start_beside(self.clean, self._settings.clean_interval_seconds, self._cleaning),
            self._start_beside(self.sweep, self._settings.sweep_interval_seconds, self._sweeping),
            self._start_beside(self.forget, self._settings.forget_interval_seconds, self._forgetting),
        ]
        self._stop_requested.wait()
        give_up_at = time.monotonic() + _STOP_SECONDS
        for thread in threads:
            PROCESS.release(thread)
            thread.join(max(0.0, give_up_at - time.monotonic()))

    def _keep_time(self) -> None:
        self._until_stopped(self._listen, self._clock)
        with contextlib.suppress(*DATABASE_ERRORS), service_transaction(self._engine) as session:
            resign(session, self._holder)

    def _start_beside(self, duty: Callable[[], None], interval_seconds: float, life: Duty) -> threading.Thread:
        def work() -> None:
            self._until_stopped(lambda: self._repeat(duty, interval_seconds, life), life)

        return PROCESS.start_thread(work, name=life.name)

    def _until_stopped(self, serve: Callable[[], None], life: Duty) -> None:
        while not self._stop_requested.is_set():
            life.beat()
            try:
                serve()
            except DATABASE_ERRORS as error:
                log.warning("database.unavailable", error=type(error).__name__)
                self._stop_requested.wait(self._settings.wake_interval_seconds)

    def _listen(self) -> None:
        with Subscription(self._settings.database_url.get_secret_value(), WAKE_CHANNEL) as subscription:
            while not self._stop_requested.is_set():
                self._clock.beat()
                self._run_due(self.wake_pools, self._settings.wake_interval_seconds)
                self._run_due(self.expire, self._settings.reap_interval_seconds)
                if subscription.receive(timeout_seconds=self._settings.wake_interval_seconds / 4):
                    self._run(self.wake_pools)
                    self._stop_requested.wait(_GATHER_SECONDS)

    def _repeat(self, duty: Callable[[], None], interval_seconds: float, life: Duty) -> None:
        while not self._stop_requested.is_set():
            life.beat()
            self._run_due(duty, interval_seconds)
            self._stop_requested.wait(self._settings.wake_interval_seconds)

    def _run_due(self, duty: Callable[[], None], interval_seconds: float) -> None:
        if time.monotonic() >= self._due_at.get(duty, 0.0):
            with DUTY_SECONDS.labels(duty.__name__).time():
                self._run(duty)
            self._due_at[duty] = time.monotonic() + interval_seconds

    def _run(self, duty: Callable[[], None]) -> None:
        """Do a duty. If it takes too long, it is itself at fault: the database is there. Others continue."""
        try:
            duty()
        except DATABASE_ERRORS as error:
            if not took_too_long(error):
                raise
            log.exception("duty.timed_out", duty=duty.__name__, sqlstate=state_of(error))

    def _leads(self, session: ServiceSession) -> bool:
        is_leader = lead(session, self._holder, lease_seconds=self._settings.leader_lease_seconds)
        if is_leader != self._is_leader:
            log.info("schedule.leads" if is_leader else "schedule.stands_by", holder=self._holder)
            self._is_leader = is_leader
        return is_leader

    def wake_pools(self) -> None:
        with service_transaction(self._engine) as session:
            is_leader = self._leads(session)
            newcomers = list_newcomers(session) if is_leader else ()
        for tenant_id in newcomers:
            with service_transaction(self._engine) as session:
                level_newcomer(session, tenant_id)
        with service_transaction(self._engine) as session:
            pools = claimable_pools(session) if is_leader else ()
        try:
            for pool in pools:
                if self._publisher.publish(pool):
                    POOLS_WOKEN.labels(pool).inc()
                    log.info("pool.woken", pool=pool)
        except (redis.RedisError, BrokerError) as error:
            log.warning("broker.unavailable", error=type(error).__name__)

    def expire(self) -> None:
        with service_transaction(self._engine) as session:
            num_expired = expire_leases(session) if self._leads(session) else 0
        LEASES_EXPIRED.inc(num_expired)
        if num_expired:
            log.warning("leases.expired", num_jobs=num_expired)

    def clean(self) -> None:
        """Delete what is over."""
        with service_transaction(self._engine) as session:
            if not self._leads(session):
                return
            forget_expired_keys(session)
            forget_set_asides(session)
            expire_files(session)
        try:
            min_age = dt.timedelta(seconds=self._settings.garbage_age_seconds)
            erase(self._engine, self._store, min_age=min_age, may_go_on=self._may_clean)
            OBJECTS_DELETED.labels("purge").inc(purge(self._engine, self._store, may_go_on=self._may_clean))
        except StorageError as error:
            log.warning("storage.unavailable", error=str(error))

    def _may_clean(self, session: ServiceSession) -> bool:
        return self._may_go_on(session, self._cleaning)

    def _may_go_on(self, session: ServiceSession, life: Duty) -> bool:
        life.beat()
        return not self._stop_requested.is_set() and self._leads(session)

    def forget(self) -> None:
        """Delete rows that are older than the settings allow."""
        forget(
            self._engine,
            days_kept(self._settings),
            may_go_on=lambda session: self._may_go_on(session, self._forgetting),
        )

    def sweep(self) -> None:
        """Delete objects that no row names, and book the usage that lost workers have not reported."""
        with service_transaction(self._engine) as session:
            if not self._leads(session):
                return
        try:
            num_settled = settle(self._engine)
            num_deleted = sweep(
                self._engine,
                self._store,
                min_age=dt.timedelta(seconds=self._settings.garbage_age_seconds),
                show_life=self._sweeping.beat,
            )
            OBJECTS_DELETED.labels("sweep").inc(num_deleted)
            log.info("objects.swept", num_objects=num_deleted, num_attempts_settled=num_settled)
        except StorageError as error:
            log.warning("storage.unavailable", error=str(error))


def main() -> None:
    hide_memory()
    configure_logs("schedule")
    settings = ScheduleSettings()
    engine = connect(settings.database_url.get_secret_value(), lock_timeout_seconds=_LOCK_TIMEOUT_SECONDS)
    with WakeUpPublisher(settings.redis_url.get_secret_value()) as publisher:
        store = S3ObjectStore(settings.storage_config, now=DatabaseClock(engine).now)
        schedule = Schedule(settings, engine=engine, store=store, publisher=publisher)
        REGISTRY.register(QueueCollector(engine, is_leader=lambda: schedule.is_leader))
        ManagementServer(settings, readiness=find_readiness(engine, store, is_store_vital=False))
        signal.signal(signal.SIGTERM, schedule.request_stop)
        signal.signal(signal.SIGINT, schedule.request_stop)
        schedule.run()
