"""Workers without devices: `python -m bench.stub_workers FIRST END`, one driver process of bench.scale_out.

Each worker is a real supervisor in a thread, with a stub instead of its trainer. As for a worker, settings come from
the environment. For each line on standard input, it prints a line of JSON with the measurements since the last one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import redis
import structlog
from sqlalchemy import Engine, event

from core.db.clock import DatabaseClock
from core.db.session import connect
from core.domain.jobs import pool_name
from core.domain.values import StoredFile
from core.queue import queue_name
from core.redis_urls import read_redis_url
from core.settings import WorkerSettings
from core.storage import ObjectStore, S3ObjectStore, StoredObject
from worker.messages import (
    BaseLoaded,
    DeviceLeft,
    JobStarted,
    JobSucceeded,
    JobYielded,
    LoadBase,
    Report,
    StartJob,
    StepDone,
    StopJob,
    UsageCounted,
    YieldJob,
)
from worker.supervisor.held_jobs import Claim
from worker.supervisor.loading import InspectedBase
from worker.supervisor.presence import Presence
from worker.supervisor.reports import ReportKeeper
from worker.supervisor.rounds import Round
from worker.supervisor.runner import Runner

BASES = tuple(f"acme-labs/base-{number}" for number in range(4))
STEPS_AN_EPOCH = 8
LOAD_SECONDS = 2.0
CONNECTIONS = 12
CONTENT = b"adapter"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class StubJob:
    order: StartJob
    num_steps: int
    step: int = 0


class StubTrainer:
    """What a trainer child is to its supervisor, without a process: every fused step takes so long."""

    pid = 0
    is_alive = True

    def __init__(self, *, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._reports: list[Report] = []
        self._jobs: dict[int, StubJob] = {}
        self._next_step_at = 0.0

    @property
    def silent_seconds(self) -> float:
        return 0.0

    def send(self, order: object) -> None:
        if isinstance(order, StartJob):
            if not self._jobs:
                self._next_step_at = time.monotonic() + self._step_seconds
            num_steps = STEPS_AN_EPOCH * order.spec.n_epochs
            self._jobs[order.lease_token] = StubJob(order, num_steps)
            self._reports.append(JobStarted(lease_token=order.lease_token, step=0, total_steps=num_steps))
        elif isinstance(order, StopJob | YieldJob) and order.lease_token in self._jobs:
            del self._jobs[order.lease_token]
            self._leave(order.lease_token)
            if isinstance(order, YieldJob):
                self._reports.append(JobYielded(lease_token=order.lease_token))

    def receive(self, *, timeout_seconds: float) -> Report | None:
        now = time.monotonic()
        if not self._reports and self._jobs and now >= self._next_step_at:
            self._next_step_at = max(self._next_step_at + self._step_seconds, now)
            self._take_step()
        if not self._reports:
            is_due_in = self._next_step_at - now if self._jobs else timeout_seconds
            time.sleep(max(0.0, min(timeout_seconds, is_due_in)))
            return None
        return self._reports.pop(0)

    def kill(self) -> None:
        self._jobs.clear()

    close = kill

    def _take_step(self) -> None:
        share = self._step_seconds / len(self._jobs)
        for token, job in tuple(self._jobs.items()):
            job.step += 1
            self._reports.append(_step_of(token, job))
            self._reports.append(
                UsageCounted(lease_token=token, gpu_seconds=share * job.step, trained_tokens=job.step * 256)
            )
            if job.step == job.num_steps:
                del self._jobs[token]
                self._leave(token)
                self._reports.append(_success_of(token, job))

    def _leave(self, token: int) -> None:
        self._reports.append(DeviceLeft(lease_token=token))


def _step_of(token: int, job: StubJob) -> StepDone:
    return StepDone(
        lease_token=token,
        step=job.step,
        total_steps=job.num_steps,
        train_loss=1 / job.step,
        train_token_accuracy=0.5,
        learning_rate=1e-4,
        grad_norm=1.0,
        num_tokens=256,
    )


def _success_of(token: int, job: StubJob) -> JobSucceeded:
    file = StoredFile(name="adapter_model.safetensors", size_bytes=len(CONTENT), sha256=SHA256)
    return JobSucceeded(lease_token=token, adapter_files=(file,), result_file=file, trained_tokens=job.step * 256)


class StubStarter:
    """Where a supervisor's trainers come from."""

    def __init__(self, tokenizer_path: Path, *, step_seconds: float) -> None:
        self._tokenizer_path, self._step_seconds = tokenizer_path, step_seconds

    def inspect(self, _order: LoadBase) -> InspectedBase:
        trainer = StubTrainer(step_seconds=self._step_seconds)
        return InspectedBase(trainer, self._tokenizer_path)  # type: ignore[arg-type]

    def load_weights(self, _trainer: StubTrainer) -> BaseLoaded:
        time.sleep(LOAD_SECONDS)
        return BaseLoaded(seconds=LOAD_SECONDS)


class StubStore(S3ObjectStore):
    """Signs as the real one does; what is read back of an adapter is what the stub said it stored."""

    def hash_object(self, object_key: str) -> StoredObject:  # noqa: ARG002
        return StoredObject(size_bytes=len(CONTENT), sha256=SHA256)


@dataclass
class Tally:
    """What a driver's workers have measured, in milliseconds, since the last look."""

    claims_ms: list[float] = field(default_factory=list)
    beats_ms: list[float] = field(default_factory=list)
    records_ms: list[float] = field(default_factory=list)
    num_claimed: int = 0
    num_wake_ups: int = 0
    num_serving: int = 0
    cpu_seconds: float = 0.0


class StubWorker:
    """A real supervisor in a thread, with a stub for its trainer."""

    def __init__(self, number: int, settings: WorkerSettings, driver: Driver) -> None:
        pool = pool_name(BASES[number % len(BASES)], None)
        settings = settings.model_copy(update={"worker_name": f"w{number}", "worker_pools": (pool,)})
        self.pool = pool
        self.runner = MeasuredRunner(settings, driver)
        self.presence = Presence(
            driver.engine, driver.clock, interval_seconds=settings.heartbeat_seconds, describe=self.runner.describe
        )
        self._woken = threading.Semaphore(0)
        self.is_idle = True
        threading.Thread(target=self._run, daemon=True).start()
        self.presence.start()

    def wake(self) -> None:
        self.is_idle = False
        self._woken.release()

    def _run(self) -> None:
        while self._woken.acquire():
            self.runner.serve()
            self.is_idle = True


class MeasuredRunner(Runner):
    def __init__(self, settings: WorkerSettings, driver: Driver) -> None:
        super().__init__(
            settings,
            engine=driver.engine,
            heartbeat_engine=driver.beat_engine,
            store=driver.store,
            clock=driver.clock,
        )
        # The simulation's one hand on the supervisor.
        self._base._starter = driver.starter  # type: ignore[assignment]  # noqa: SLF001
        self._tally = driver.tally
        self._measure_claims(self._round)
        self._measure_records(self._round._reports)  # noqa: SLF001

    def _measure_claims(self, served: Round) -> None:
        claim = served._claim  # noqa: SLF001

        def measured(store: ObjectStore) -> Claim | None:
            started = time.perf_counter()
            claimed = claim(store)
            self._tally.claims_ms.append((time.perf_counter() - started) * 1000)
            self._tally.num_claimed += claimed is not None
            return claimed

        served._claim = measured  # type: ignore[method-assign]  # noqa: SLF001

    def _measure_records(self, reports: ReportKeeper) -> None:
        record = reports.record_progress

        def measured() -> None:
            has_any = bool(reports._unrecorded)  # noqa: SLF001
            started = time.perf_counter()
            record()
            if has_any:
                self._tally.records_ms.append((time.perf_counter() - started) * 1000)

        reports.record_progress = measured  # type: ignore[method-assign]


class Driver:
    """One process with some of the workers, and the connections that they share."""

    def __init__(self, settings: WorkerSettings, *, step_seconds: float, directory: Path) -> None:
        url = settings.database_url.get_secret_value()
        self.engine = connect(url, pool_size=CONNECTIONS)
        self.beat_engine = connect(url, pool_size=CONNECTIONS // 2)
        self.store = StubStore(settings.storage_config)
        self.clock = DatabaseClock(self.engine)
        tokenizer_path = directory / "tokenizer.json"
        tokenizer_path.write_bytes(b"{}")
        self.starter = StubStarter(tokenizer_path, step_seconds=step_seconds)
        self.tally = Tally()
        self._redis = redis.Redis.from_url(**read_redis_url(settings.redis_url.get_secret_value()).arguments)
        self._workers: list[StubWorker] = []
        _measure(self.beat_engine, self.tally.beats_ms)

    def start(self, numbers: Sequence[int], settings: WorkerSettings) -> None:
        self._workers = [StubWorker(number, settings, self) for number in numbers]
        threading.Thread(target=self._hear_wake_ups, daemon=True).start()

    def look(self) -> Tally:
        """Return what was measured since the last look, and begin anew."""
        tally = self.tally
        seen = Tally(**{**asdict(tally), "cpu_seconds": time.process_time()})
        seen.num_serving = sum(not worker.is_idle for worker in self._workers)
        for values in (tally.claims_ms, tally.beats_ms, tally.records_ms):
            values.clear()
        tally.num_claimed = tally.num_wake_ups = 0
        return seen

    def _hear_wake_ups(self) -> None:
        """Hand each wake-up to an idle worker of its pool, as Celery's consumer would; without one it stays."""
        while True:
            idle = {queue_name(worker.pool): worker for worker in self._workers if worker.is_idle}
            if not idle:
                time.sleep(0.05)
                continue
            taken = self._redis.blpop(list(idle), timeout=1)
            if taken is not None:
                self.tally.num_wake_ups += 1
                idle[taken[0].decode()].wake()  # type: ignore[union-attr]  # bytes, as the client was not told to decode


def _measure(engine: Engine, values: list[float]) -> None:
    """Append how long each statement of an engine takes, its way there and back included."""

    @event.listens_for(engine, "before_cursor_execute")
    def begin(connection: object, *_rest: object) -> None:
        connection.info["began"] = time.perf_counter()  # type: ignore[attr-defined]

    @event.listens_for(engine, "after_cursor_execute")
    def end(connection: object, *_rest: object) -> None:
        values.append((time.perf_counter() - connection.info["began"]) * 1000)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int)
    parser.add_argument("--step-seconds", type=float, default=5.0)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    settings = WorkerSettings()
    with tempfile.TemporaryDirectory() as name:
        driver = Driver(settings, step_seconds=options.step_seconds, directory=Path(name))
        driver.start(range(options.first, options.end), settings)
        for _line in sys.stdin:
            print(json.dumps(asdict(driver.look())), flush=True)
    os._exit(0)  # its threads need not end first: the database they work on is over


if __name__ == "__main__":
    main()
