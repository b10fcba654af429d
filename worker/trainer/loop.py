"""The training loop: orders and finished background work, then one fused step, again and again.

Nothing here waits while a job can step. Downloads, tokenising and uploads run on threads, and their results are applied
between steps. Orders do not wait for a step's end: the engine lets the loop look at them between two products.

What an order or a result does depends on when it comes:

| what comes | between steps | within a step |
|---|---|---|
| StartJob | it is prepared on a thread | the same |
| StopJob | it leaves its slot, and its files go | the same; its part of the step is booked at the step's end |
| YieldJob | its state is copied, it leaves its slot, and is given back | the same, but given back at the step's end |
| a result of background work | applied: a job is admitted, goes on, or is finished | applied at the step's end |
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from safetensors import SafetensorError

from core.domain.dataset_counts import FILE_FIELDS, DatasetName
from core.domain.values import Frozen
from worker.engine import Engine, EngineError, NoFreeSlotError, SlotReport
from worker.messages import Alive, DeviceLeft, JobFailed, LoadBase, SlotRefused, StartJob, StopJob, YieldJob
from worker.trainer.bases import LoadedBase
from worker.trainer.channel import Channel, start_pool
from worker.trainer.device_figures import DeviceMeter
from worker.trainer.failures import TrainerError
from worker.trainer.jobs import TrainerJob
from worker.trainer.preparing import PreparedJob, prepare_job

log = structlog.get_logger()
_LIFE_SECONDS = 1.0
# Errors that end one job and not the trainer. OSError and SafetensorError mean a scratch disk that is full or broken.
JOB_ERRORS = (TrainerError, EngineError, OSError, SafetensorError)


@dataclass(frozen=True)
class Place:
    """The place of an error in a job's files, as far as it is in one."""

    file: DatasetName | None = None
    line_number: int | None = None
    field: str | None = None

    @property
    def param(self) -> str | None:
        """The field of the submission that named the file."""
        return FILE_FIELDS[self.file] if self.file else None

    @property
    def details(self) -> dict[str, str | int]:
        found = {"file": self.file, "line": self.line_number, "field": self.field}
        return {name: value for name, value in found.items() if value is not None}


class TrainingLoop:
    """Runs the engine (admit, step, evict) for the supervisor's orders."""

    def __init__(
        self, channel: Channel, engine: Engine, base: LoadedBase, order: LoadBase, *, scratch_dir: Path
    ) -> None:
        self._order = order
        self._scratch_dir = scratch_dir
        self._shown_at = 0.0
        self._channel = channel
        self._engine = engine
        self._base = base
        # Separate from the channel's threads, so that an upload does not wait behind long downloads and tokenising.
        self._preparing = start_pool(order.slots)
        self._jobs: dict[int, TrainerJob] = {}
        # Prepared jobs that wait until another job frees the memory that they need.
        self._waiting: deque[tuple[TrainerJob, PreparedJob]] = deque()
        # What arrived during a step, to be applied at its end.
        self._postponed: deque[Callable[[], None]] = deque()
        # Jobs that were evicted but may still have examples in the step under way, so their leaving is not reported
        # yet.
        self._leaving: list[int] = []
        # Jobs stopped during the step under way. Their part of it is booked at its end.
        self._stopped: dict[int, TrainerJob] = {}
        self._is_stepping = False
        self._meter = DeviceMeter(engine.device, flops_per_token=engine.flops_per_token)

    def run(self) -> None:
        while True:
            self._show_life()
            while self._postponed:
                self._apply(self._postponed.popleft())
            while (item := self._channel.receive(wait_seconds=_LIFE_SECONDS if self._is_idle else 0)) is not None:
                self._apply(item)
            self._admit_waiting()
            self._step()

    @property
    def _is_idle(self) -> bool:
        return self._engine.is_idle and not self._waiting

    def _look(self) -> None:
        """Take the orders that came during a step, and report that the step continues."""
        self._show_life()
        while (item := self._channel.receive(wait_seconds=0)) is not None:
            if isinstance(item, Frozen):
                self._apply(item)
            else:
                self._postponed.append(item)  # not now: it may admit a job
        self._report_who_left()

    def _show_life(self) -> None:
        """Report that this loop turns, and what its jobs have used. Another thread must not: it would hide a hung step.

        It is also called between products, so that a step of minutes does not look hung.
        """
        if time.monotonic() - self._shown_at < _LIFE_SECONDS:
            return
        self._shown_at = time.monotonic()
        self._channel.send(Alive())
        num_preparing = sum(job.is_preparing for job in self._jobs.values())
        self._channel.send(self._meter.take(num_preparing=num_preparing, num_waiting=len(self._waiting)))
        for job in self._jobs.values():
            job.bill()

    def _apply(self, item: Any) -> None:
        match item:
            case StartJob():
                self._start(item)
            case StopJob():
                self._stop(item.lease_token)
            case YieldJob():
                self._yield(item.lease_token)
            case _:
                item()

    def _start(self, order: StartJob) -> None:
        job = TrainerJob(
            order, channel=self._channel, base=self._base, base_order=self._order, scratch_dir=self._scratch_dir
        )
        self._jobs[order.lease_token] = job
        self._channel.deliver(self._preparing.submit(prepare_job, job.attempt), self._guarded(job, self._admit))

    def _admit(self, job: TrainerJob, prepared: PreparedJob) -> None:
        job.is_preparing = False
        if job.is_ending:
            return
        try:
            self._engine.admit(job.as_engine_job(prepared))
        except NoFreeSlotError:
            if not job.is_waiting:
                job.is_waiting = True
                self._channel.send(SlotRefused(lease_token=job.lease_token))
            self._waiting.append((job, prepared))
            return
        is_trained = job.begin(self._engine, prepared)
        log.info("job.admitted", **job.attempt.ids, num_examples=len(prepared.training.examples))
        job.attempt.log("job.admitted", num_examples=len(prepared.training.examples))
        if is_trained:
            self._publish(job)

    def _admit_waiting(self) -> None:
        """Try to admit the jobs that wait for memory, in their order. The engine may have room since the last step."""
        # Taken out first: `_admit` appends those again that still get no memory, so their order stays.
        for job, prepared in [self._waiting.popleft() for _ in range(len(self._waiting))]:
            if self._jobs.get(job.lease_token) is job:
                try:
                    self._admit(job, prepared)
                except JOB_ERRORS as error:
                    self._fail(job, error)

    def _step(self) -> None:
        started = time.monotonic()
        self._is_stepping = True
        reports = self._engine.step(look=self._look)  # `_look` takes orders during the step
        self._is_stepping = False
        self._report_who_left()
        self._book(reports, time.monotonic() - started)
        for report in reports:
            job = self._jobs.get(int(report.slot_name))
            if job is not None and not job.is_ending:
                self._take_report(job, report)

    def _book(self, reports: tuple[SlotReport, ...], seconds: float) -> None:
        """Divide the step's time among the jobs that had a part in it, including those that left during it."""
        cost_tokens = sum(report.cost_tokens for report in reports)
        if reports:
            self._meter.note_step(seconds=seconds, cost_tokens=cost_tokens)
        jobs = self._jobs | self._stopped
        for report in reports:
            if cost_tokens:  # there is none if the step's only report is a row that did not fit
                jobs[int(report.slot_name)].use_device(seconds * report.cost_tokens / cost_tokens)
        for job in self._stopped.values():
            job.bill()
        self._stopped.clear()

    def _take_report(self, job: TrainerJob, report: SlotReport) -> None:
        if report.failure is not None:
            self._fail(job, report.failure)
            return
        try:
            is_trained = job.take_report(self._engine, report)
        except JOB_ERRORS as error:
            self._fail(job, error)
            return
        if is_trained:
            self._publish(job)
        elif job.awaited_upload is not None:
            self._channel.deliver(job.awaited_upload, self._guarded(job, self._go_on))

    def _go_on(self, job: TrainerJob, _is_stored: object) -> None:
        """Resume a job whose upload has ended."""
        if not job.is_ending and job.go_on(self._engine):
            self._publish(job)

    def _publish(self, job: TrainerJob) -> None:
        self._evict(job)
        self._channel.deliver(job.publish(), self._guarded(job, self._finish))

    def _finish(self, job: TrainerJob, _result: None) -> None:
        del self._jobs[job.lease_token]
        job.close()

    def _stop(self, lease_token: int) -> None:
        job = self._jobs.pop(lease_token, None)
        if job is None:
            return
        if self._is_stepping:
            self._stopped[lease_token] = job
        if not job.is_ending:
            self._evict(job)
        job.close()

    def _yield(self, lease_token: int) -> None:
        """Store a job's slot as it is now and free it. A job that is already ending ends as it would."""
        job = self._jobs.get(lease_token)
        if job is None or job.is_ending:
            return
        if str(lease_token) in self._engine.slot_names:
            job.save_last_resume_point(self._engine)
        self._evict(job)
        if self._is_stepping:
            self._postponed.append(lambda: self._give_back(job))  # the end of the step counts as its use
        else:
            self._give_back(job)

    def _give_back(self, job: TrainerJob) -> None:
        if self._jobs.get(job.lease_token) is job:  # and was not stopped since
            self._channel.deliver(job.give_back(), self._guarded(job, self._finish))

    def _fail(self, job: TrainerJob, error: Exception) -> None:
        log.warning("job.failed", **job.attempt.ids, error=type(error).__name__)
        code, is_job_fault = _classify(error)
        place = _locate(job, error)
        job.bill()
        job.attempt.log("job.failed", code=code, **place.details)
        self._channel.send(
            JobFailed(
                lease_token=job.lease_token,
                code=code,
                message=_explain(error, place),
                is_job_fault=is_job_fault,
                param=place.param,
            )
        )
        self._stop(job.lease_token)

    def _evict(self, job: TrainerJob) -> None:
        """Remove a job from the device, and from the queues that lead there."""
        job.is_ending = True
        job.end_training()
        if str(job.lease_token) in self._engine.slot_names:
            self._engine.evict(str(job.lease_token))
        self._leaving.append(job.lease_token)
        self._report_who_left()

    def _report_who_left(self) -> None:
        if not self._leaving:
            return
        running_names = self._engine.running_names
        for lease_token in tuple(self._leaving):
            if str(lease_token) not in running_names:
                self._leaving.remove(lease_token)
                self._channel.send(DeviceLeft(lease_token=lease_token))

    def _guarded(self, job: TrainerJob, apply: Callable[[TrainerJob, Any], None]) -> Callable[[Future[Any]], None]:
        """Return a callback that applies a background result, or fails the job; a stopped job's result is dropped."""

        def take(done: Future[Any]) -> None:
            if self._jobs.get(job.lease_token) is not job:
                return
            try:
                apply(job, done.result())
            except JOB_ERRORS as error:
                self._fail(job, error)

        return take


def _classify(error: Exception) -> tuple[str, bool]:
    if isinstance(error, OSError | SafetensorError):
        return "worker_disk", False
    if isinstance(error, TrainerError):
        return error.code, error.is_job_fault
    assert isinstance(error, EngineError)
    return error.code, error.is_job_fault


def _locate(job: TrainerJob, error: Exception) -> Place:
    if isinstance(error, EngineError) and error.is_about_example:
        return Place(file=job.file_in_use)
    if isinstance(error, TrainerError):
        return Place(error.file, error.line_number, error.field)
    return Place()


def _explain(error: Exception, place: Place) -> str:
    if isinstance(error, OSError | SafetensorError):  # the error's own message contains paths of the worker
        return "The worker's scratch disk is full or broken."
    if isinstance(error, EngineError) and place.file is not None:
        return f"In the {place.file} file: {error}"
    return str(error)
