"""The worker process: one Celery task that serves until there is no work."""

from __future__ import annotations

import tempfile
from pathlib import Path

from celery import Celery
from celery.signals import worker_ready, worker_shutdown, worker_shutting_down
from prometheus_client import REGISTRY
from sqlalchemy import Engine

from core.db.clock import DatabaseClock
from core.db.session import connect
from core.queue import TASK_NAME
from core.sandbox import hide_memory
from core.scratch import remove_abandoned
from core.services.readiness import find_readiness
from core.settings import WorkerSettings
from core.storage import S3ObjectStore
from core.telemetry.liveness import ending_process
from core.telemetry.logs import configure_logs
from core.telemetry.management import ManagementServer
from core.telemetry.tracing import configure_tracing
from worker.supervisor.app import create_celery
from worker.supervisor.idle_exit import IdleExit
from worker.supervisor.metrics import WorkerCollector
from worker.supervisor.presence import Presence
from worker.supervisor.runner import Runner
from worker.supervisor.warming import Warmer
from worker.supervisor.watchdog import Watchdog


def build_worker(settings: WorkerSettings, runner: Runner, *, engine: Engine, clock: DatabaseClock) -> Celery:
    """Return the Celery application with its one task registered."""
    celery = create_celery(settings)
    presence = Presence(engine, clock, interval_seconds=settings.heartbeat_seconds, describe=runner.describe)

    def serve() -> None:
        """Serve. An unexpected error ends the process: Celery would swallow it, and leases would still be prolonged."""
        with ending_process("serving"):
            runner.serve()

    celery.task(name=TASK_NAME)(serve)

    @worker_ready.connect(weak=False)
    def show_presence(**_details: object) -> None:
        presence.start()
        if settings.idle_exit_seconds is not None:
            IdleExit(runner, idle_seconds=settings.idle_exit_seconds).start()

    @worker_shutting_down.connect(weak=False)
    def stop_serving(**_details: object) -> None:
        runner.request_stop()

    @worker_shutdown.connect(weak=False)
    def end_presence(**_details: object) -> None:
        presence.close()

    return celery


def main() -> None:
    hide_memory()
    configure_logs("worker")
    settings = WorkerSettings()
    configure_tracing("worker", settings)
    database_url = settings.database_url.get_secret_value()
    engine = connect(database_url, pool_size=2)
    clock = DatabaseClock(engine)
    store = S3ObjectStore(settings.storage_config, now=clock.now)
    runner = Runner(
        settings,
        engine=engine,
        heartbeat_engine=connect(database_url, pool_size=1),
        store=store,
        clock=clock,
    )
    REGISTRY.register(WorkerCollector(runner.describe, find_figures=lambda: runner.device_figures))
    management = ManagementServer(settings, readiness=find_readiness(engine, store, is_store_vital=True))
    Watchdog(settings, runner).start()
    longest_seconds = settings.trainer_start_seconds * (1 + 2 * len(settings.worker_pools))
    warmer = Warmer(
        runner, interval_seconds=settings.heartbeat_seconds, patience_seconds=longest_seconds + settings.deaf_seconds
    )
    warmer.start()
    try:
        build_worker(settings, runner, engine=engine, clock=clock).worker_main(
            ["--quiet", "worker", "--pool=threads", "--concurrency=1", "--loglevel=INFO", "--without-mingle"]
        )
    finally:
        runner.request_stop()
        warmer.close()
        runner.wait_until_idle()  # the watchdog may be serving, which Celery cannot see
        runner.close()  # ends the trainer, which would otherwise leave its scratch directory
        management.close()
        remove_abandoned(settings.scratch_dir or Path(tempfile.gettempdir()))
