"""The clock beside the workers: wakes pools that have work, expires leases, deletes what is deleted or too old.

Several may run; the one that holds the leader's row does the duties, the others stand by. Every duty may still be done
twice or by two schedules at once: wake-ups are hints, and expiry re-checks the lease in the statement that locks it. A
notification from PostgreSQL makes a wake-up quicker; the tick makes it certain.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import psycopg
import redis
import structlog
from kombu.exceptions import OperationalError as BrokerError
from prometheus_client import REGISTRY
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from core.db.clock import DatabaseClock
from core.db.readiness import find_database_obstacle
from core.db.session import DATABASE_ERRORS, connect, service_transaction
from core.queue import WakeUpPublisher
from core.sandbox import hide_memory
from core.services.attempts import claimable_pools, expire_leases
from core.services.charges import level_newcomer, list_newcomers
from core.services.files import expire_files
from core.services.idempotency import forget_expired_keys
from core.services.jobs import WAKE_CHANNEL
from core.services.leadership import lead, resign
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
# A process that was stopped while one of its transactions waited for another must not be handed the leadership when the
# other is ended for it: the wait is over before that.
_LOCK_TIMEOUT_SECONDS = 2.0
# After a wake-up, what is notified within this time is answered by one more: hundreds of submissions a second would
# otherwise be as many looks at all queues.
_GATHER_SECONDS = 0.05
# A thread that has shown no sign of life for so long hangs. All wait in bounded steps, for the database and the object
# store too; the sweep's longest is the listing of one tenant's objects.
_CLOCK_PATIENCE_SECONDS = 120.0
_CLEAN_PATIENCE_SECONDS = 900.0
_SWEEP_PATIENCE_SECONDS = 3600.0
_FORGET_PATIENCE_SECONDS = 900.0


class Schedule:
    """Runs each duty at its interval, while it leads, until it is stopped."""

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
        self._is_broken = False
        self._clock = PROCESS.add_duty("the clock that wakes and expires", patience_seconds=_CLOCK_PATIENCE_SECONDS)
        self._cleaning = PROCESS.add_duty("cleaning", patience_seconds=_CLEAN_PATIENCE_SECONDS)
        self._sweeping = PROCESS.add_duty("sweeping", patience_seconds=_SWEEP_PATIENCE_SECONDS)
        self._forgetting = PROCESS.add_duty("forgetting", patience_seconds=_FORGET_PATIENCE_SECONDS)

    @property
    def is_leader(self) -> bool:
        """Whether it led when it last looked."""
        return self._is_leader

    def request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stop_requested.set()

    def run(self) -> int:
        """Do the duties until told to stop, and return the process's exit status."""
        # Apart from the others, because an object store that hangs must not keep pools asleep; and from each other,
        # because each may take long.
        threads = [
            self._make_thread(self.clean, self._settings.clean_interval_seconds, self._cleaning),
            self._make_thread(self.sweep, self._settings.sweep_interval_seconds, self._sweeping),
            self._make_thread(self.forget, self._settings.forget_interval_seconds, self._forgetting),
        ]
        for thread in threads:
            PROCESS.watch(thread)
            thread.start()
        try:
            self._until_stopped(self._listen, self._clock)
        finally:
            self._stop_requested.set()
            for thread in threads:
                PROCESS.release(thread)
                thread.join()
        with contextlib.suppress(*DATABASE_ERRORS), service_transaction(self._engine) as session:
            resign(session, self._holder)
        return int(self._is_broken)

    def _until_stopped(self, serve: Callable[[], None], life: Duty) -> None:
        while not self._stop_requested.is_set():
            life.beat()
            try:
                serve()
            except (psycopg.OperationalError, *DATABASE_ERRORS) as error:
                log.warning("database.unavailable", error=type(error).__name__)
                self._stop_requested.wait(self._settings.wake_interval_seconds)

    def _listen(self) -> None:
        url = self._settings.database_url.get_secret_value()
        with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
            connection.execute(f"listen {WAKE_CHANNEL}")
            while not self._stop_requested.is_set():
                self._clock.beat()
                self._run_due(self.wake_pools, self._settings.wake_interval_seconds)
                self._run_due(self.expire, self._settings.reap_interval_seconds)
                notifications = connection.notifies(timeout=self._settings.wake_interval_seconds / 4, stop_after=1)
                if list(notifications):
                    self.wake_pools()
                    self._stop_requested.wait(_GATHER_SECONDS)

    def _make_thread(self, duty: Callable[[], None], interval_seconds: float, life: Duty) -> threading.Thread:
        return threading.Thread(target=self._run_beside, args=(duty, interval_seconds, life), name=life.name)

    def _run_beside(self, duty: Callable[[], None], interval_seconds: float, life: Duty) -> None:
        """Do a duty at its interval. A thread that dies of a fault of ours ends the process, to be started again."""
        try:
            self._until_stopped(lambda: self._repeat(duty, interval_seconds, life), life)
        finally:
            self._is_broken |= not self._stop_requested.is_set()
            self._stop_requested.set()

    def _repeat(self, duty: Callable[[], None], interval_seconds: float, life: Duty) -> None:
        while not self._stop_requested.is_set():
            life.beat()
            self._run_due(duty, interval_seconds)
            self._stop_requested.wait(self._settings.wake_interval_seconds)

    def _run_due(self, duty: Callable[[], None], interval_seconds: float) -> None:
        if time.monotonic() >= self._due_at.get(duty, 0.0):
            with DUTY_SECONDS.labels(duty.__name__).time():
                duty()
            self._due_at[duty] = time.monotonic() + interval_seconds

    def _leads(self, session: Session) -> bool:
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

    def _may_clean(self, session: Session) -> bool:
        return self._may_go_on(session, self._cleaning)

    def _may_go_on(self, session: Session, life: Duty) -> bool:
        life.beat()
        return not self._stop_requested.is_set() and self._leads(session)

    def forget(self) -> None:
        """Delete what is older than the settings keep it."""
        forget(
            self._engine,
            days_kept(self._settings),
            may_go_on=lambda session: self._may_go_on(session, self._forgetting),
        )

    def sweep(self) -> None:
        """Delete what no row names, and settle what lost workers have not reported."""
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
    settings = ScheduleSettings()  # read from the environment
    engine = connect(settings.database_url.get_secret_value(), lock_timeout_seconds=_LOCK_TIMEOUT_SECONDS)
    with WakeUpPublisher(settings.redis_url.get_secret_value()) as publisher:
        store = S3ObjectStore(settings.storage_config, now=DatabaseClock(engine).now)
        schedule = Schedule(settings, engine=engine, store=store, publisher=publisher)
        REGISTRY.register(QueueCollector(engine, is_leader=lambda: schedule.is_leader))
        ManagementServer(settings, find_obstacle=lambda: find_database_obstacle(engine))
        signal.signal(signal.SIGTERM, schedule.request_stop)
        signal.signal(signal.SIGINT, schedule.request_stop)
        sys.exit(schedule.run())
