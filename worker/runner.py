"""The supervisor's loop: claim, hand to the trainer, record what it reports, end.

One base model is held at a time, and kept hot between jobs; the worker switches pools only when its own has no work and
another has. No transaction is open while the trainer, the object store or a clock is waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from core.crashpoints import CrashPoint, reach
from core.db.models import BaseModelRow, File, Job, Tenant
from core.db.session import service_transaction
from core.domain.ids import IdKind, format_id, new_id
from core.domain.jobs import fine_tuned_model_name, pool_name
from core.domain.training import TrainingSpec
from core.services import attempts
from core.services.attempts import Lease, StaleLeaseError, StepRecord
from core.services.base_models import list_base_models
from core.services.files import NewFile
from core.services.logs import record_log_line
from core.services.workers import WorkerFacts, WorkerState
from core.settings import WorkerSettings
from core.storage import ObjectStore, StorageError
from worker.artifacts import grant_file, grant_uploads, publish_tokenizer, result_filename, verify_artifact
from worker.children import TrainerChild, TrainerGoneError
from worker.failures import LEASE_LOST, STALLED, STORAGE, Failure, explain_exit
from worker.lease import LeaseKeeper
from worker.messages import (
    BaseLoaded,
    BaseRefused,
    CheckpointSaved,
    EvaluationDone,
    JobFacts,
    JobFailed,
    JobLogged,
    JobSucceeded,
    JobWarned,
    LoadBase,
    Report,
    StartJob,
    StepDone,
    StopJob,
    UrlsGranted,
    UrlsWanted,
    UsageCounted,
)

log = structlog.get_logger()
_POLL_SECONDS = 0.5


@dataclass
class HeldJob:
    """A claimed job; `usage` is what the trainer last counted."""

    lease: Lease
    result_filename: str
    usage: UsageCounted | None = None


class Runner:
    """Serves pools until there is no work. One at a time: Celery runs it with a concurrency of one."""

    def __init__(self, settings: WorkerSettings, *, engine: Engine, store: ObjectStore) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store
        self._keeper = LeaseKeeper(
            engine, lease_seconds=settings.lease_seconds, heartbeat_seconds=settings.heartbeat_seconds
        )
        self._trainer: TrainerChild | None = None
        self._pool: str | None = None
        self._slots = 0
        self._is_loading = False
        self._held: dict[int, HeldJob] = {}
        self._stop_requested = threading.Event()

    def request_stop(self) -> None:
        """Ask `serve` to give its jobs back and return. Safe from a signal's thread."""
        self._stop_requested.set()

    def describe(self) -> WorkerFacts:
        """Say what this worker holds now. Called from another thread than `serve`."""
        trainer, num_held = self._trainer, len(self._held)
        pool = self._pool if trainer is not None and trainer.is_alive else None
        state: WorkerState = "serving" if num_held else "idle"
        if self._stop_requested.is_set():
            state = "stopping"
        elif self._is_loading:
            state = "loading"
        return WorkerFacts(
            name=self._settings.worker_name,
            pools=self._settings.worker_pools,
            state=state,
            pool=pool,
            slots=max(self._slots, num_held) if pool else 0,
            slots_in_use=num_held if pool else 0,
        )

    def serve(self) -> None:
        """Work until none of this worker's pools has a claimable job and none is held."""
        while not self._stop_requested.is_set():
            try:
                if not self._held and not self._hold_pool_with_work():
                    return
                self._fill_slots()
                self._take_reports()
                self._keep_leases()
            except TrainerGoneError as error:
                self._lose_trainer(explain_exit(error.exit_code))
            except OperationalError:
                log.warning("database.unavailable", exc_info=True)
                self._stop_requested.wait(_POLL_SECONDS)
                self._fence_self()
        self._give_back()

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
            self._is_loading = False

    def _hold_pool_with_work(self) -> bool:
        with service_transaction(self._engine) as session:
            waiting = [pool for pool in attempts.claimable_pools(session) if pool in self._settings.worker_pools]
            if not waiting:
                return False
            pool = self._pool if self._pool in waiting else waiting[0]
            base = next(base for base in list_base_models(session) if pool in _pools_of(base))
        if pool != self._pool or self._trainer is None or not self._trainer.is_alive:
            self._load_base(pool, base)
        return True

    def _load_base(self, pool: str, base: BaseModelRow) -> None:
        self.close()
        self._pool, self._slots = pool, base.slots
        order = _load_order(base, pool, cache_dir=str(self._settings.cache_dir.resolve()))
        self._is_loading = True
        self._trainer = TrainerChild(order, threads=self._settings.trainer_threads)
        log.info("trainer.started", pool=pool, trainer_pid=self._trainer.pid)
        report = self._trainer.receive(timeout_seconds=self._settings.trainer_start_seconds)
        self._is_loading = False
        match report:
            case BaseLoaded() as loaded:
                log.info("base_model.loaded", pool=pool, seconds=round(loaded.seconds, 2))
                publish_tokenizer(self._engine, self._store, base.id, Path(loaded.tokenizer_path))
            case BaseRefused() as refused:
                log.error("base_model.refused", pool=pool, reason=refused.message)
                self._fail_next_job(Failure("base_model_refused", refused.message))
            case _:
                self._trainer.kill()
                raise TrainerGoneError(-9)

    def _fail_next_job(self, failure: Failure) -> None:
        """Charge a job of the pool for a base that cannot be loaded, so that its tenant is told why."""
        job = self._claim()
        if job is not None:
            self._end(_lease_of(job), failure)

    def _claim(self) -> Job | None:
        assert self._pool is not None
        with service_transaction(self._engine) as session:
            return attempts.claim_job(
                session,
                self._pool,
                worker_name=self._settings.worker_name,
                lease_seconds=self._settings.lease_seconds,
            )

    def _fill_slots(self) -> None:
        while len(self._held) < self._slots and not self._stop_requested.is_set():
            job = self._claim()
            if job is None:
                return
            reach(CrashPoint.POST_CLAIM)
            if not self._held:
                self._keeper.reset()
            lease = _lease_of(job)
            self._held[lease.token] = HeldJob(lease, result_filename(job))
            self._send(self._start_order(job))
            log.info("job.claimed", job_id=format_id(IdKind.JOB, job.id), lease_token=lease.token, pool=self._pool)

    def _start_order(self, job: Job) -> StartJob:
        with service_transaction(self._engine) as session:
            tenant = session.get_one(Tenant, job.tenant_id)
            training_file = session.get_one(File, job.training_file_id)
            validation_file = session.get(File, job.validation_file_id) if job.validation_file_id else None
        assert job.lease_token is not None
        name = fine_tuned_model_name(job.base_model_id, tenant_slug=tenant.slug, suffix=job.suffix, job_id=job.id)
        return StartJob(
            lease_token=job.lease_token,
            tenant_id=str(job.tenant_id),
            share=tenant.weight,
            spec=TrainingSpec.model_validate(job.spec),
            facts=JobFacts(
                job_id=format_id(IdKind.JOB, job.id),
                tenant=tenant.slug,
                model_name=name,
                base_model_id=job.base_model_id,
                base_revision="",
                quantization=job.quantization,
                created_at=int(job.created_at.timestamp()),
            ),
            training_file=grant_file(self._store, training_file),
            validation_file=grant_file(self._store, validation_file) if validation_file else None,
        )

    def _take_reports(self) -> None:
        assert self._trainer is not None
        report = self._trainer.receive(timeout_seconds=_POLL_SECONDS)
        while report is not None:
            self._take(report)
            report = self._trainer.receive(timeout_seconds=0)

    def _take(self, report: Report) -> None:
        held = self._held.get(getattr(report, "lease_token", -1))
        if held is None:
            return
        try:
            self._record(held, report)
        except StaleLeaseError:
            self._drop(held)
        except StorageError as error:
            log.warning("artifact.unconfirmed", lease_token=held.lease.token, error=str(error))
            self._end(held.lease, STORAGE)

    def _record(self, held: HeldJob, report: Report) -> None:
        match report:
            case StepDone():
                with service_transaction(self._engine) as session:
                    _record_step(session, held.lease, report)
            case EvaluationDone(step=step, loss=loss, accuracy=accuracy):
                with service_transaction(self._engine) as session:
                    attempts.record_evaluation(session, held.lease, step=step, loss=loss, accuracy=accuracy)
            case JobWarned(message=message):
                with service_transaction(self._engine) as session:
                    attempts.record_message(session, held.lease, message=message, level="warn")
            case JobLogged(name=name, details=details):
                with service_transaction(self._engine) as session:
                    record_log_line(session, held.lease.token, name=name, level="info", details=details)
            case UrlsWanted(artifact=artifact, names=names):
                urls = grant_uploads(self._store, held.lease, artifact=artifact, names=names)
                self._send(UrlsGranted(lease_token=held.lease.token, artifact=artifact, urls=urls))
            case CheckpointSaved():
                self._publish_checkpoint(held.lease, report)
            case UsageCounted():
                held.usage = report
            case JobSucceeded():
                self._publish_adapter(held, report)
            case JobFailed(code=code, message=message, is_job_fault=is_job_fault):
                self._end(held.lease, Failure(code, message), is_job_fault=is_job_fault)

    def _publish_checkpoint(self, lease: Lease, report: CheckpointSaved) -> None:
        artifact = verify_artifact(self._store, lease, artifact=report.artifact, files=report.files)
        with service_transaction(self._engine) as session:
            attempts.record_checkpoint(session, lease, step=report.step, artifact=artifact, metrics=report.metrics)

    def _publish_adapter(self, held: HeldJob, report: JobSucceeded) -> None:
        adapter = verify_artifact(self._store, held.lease, artifact="adapter", files=report.adapter_files)
        result = verify_artifact(self._store, held.lease, artifact="result", files=(report.result_file,))
        result_file = NewFile(
            id=new_id(),
            filename=held.result_filename,
            purpose="fine-tune-results",
            object_key=result.object_prefix + report.result_file.name,
            size_bytes=report.result_file.size_bytes,
            sha256=report.result_file.sha256,
        )
        reach(CrashPoint.PRE_FINISH)
        with service_transaction(self._engine) as session:
            attempts.succeed_attempt(
                session,
                held.lease,
                adapter=adapter,
                result_file=result_file,
                trained_tokens=report.trained_tokens,
            )
        reach(CrashPoint.POST_FINISH)
        log.info("job.succeeded", job_id=format_id(IdKind.JOB, held.lease.job_id), lease_token=held.lease.token)
        self._drop(held)

    def _keep_leases(self) -> None:
        assert self._trainer is not None
        if self._held and self._trainer.silent_seconds > self._settings.stall_seconds:
            self._trainer.kill()
            self._lose_trainer(STALLED)
        if self._held and self._keeper.is_due:
            lost = self._keeper.beat(tuple(held.lease for held in self._held.values()))
            for lease in lost:
                self._drop(self._held[lease.token])

    def _fence_self(self) -> None:
        """Stop training before the leases run out: without the database nobody can say whose the jobs are."""
        if self._held and self._keeper.must_stop:
            log.error("worker.self_fenced", num_jobs=len(self._held))
            assert self._trainer is not None
            self._trainer.kill()
            self._lose_trainer(LEASE_LOST)

    def _lose_trainer(self, failure: Failure) -> None:
        log.error("trainer.lost", code=failure.code, num_jobs=len(self._held))
        self.close()
        for held in tuple(self._held.values()):
            with self._best_effort():
                self._end(held.lease, failure)
        self._held.clear()

    def _end(self, lease: Lease, failure: Failure, *, is_job_fault: bool = False) -> None:
        with service_transaction(self._engine) as session:
            attempts.fail_attempt(session, lease, code=failure.code, message=failure.message, is_job_fault=is_job_fault)
        if held := self._held.get(lease.token):
            self._drop(held)

    def _drop(self, held: HeldJob) -> None:
        """Forget a job that has ended here, stop its training if it goes on, and book what it used."""
        self._held.pop(held.lease.token, None)
        self._send(StopJob(lease_token=held.lease.token))
        with self._best_effort(), service_transaction(self._engine) as session:
            attempts.record_usage(
                session,
                held.lease,
                gpu_seconds=held.usage.gpu_seconds if held.usage else 0.0,
                trained_tokens=held.usage.trained_tokens if held.usage else 0,
            )

    def _give_back(self) -> None:
        for held in tuple(self._held.values()):
            with self._best_effort(), service_transaction(self._engine) as session:
                attempts.requeue_attempt(session, held.lease)
            self._drop(held)
        self.close()

    @contextmanager
    def _best_effort(self) -> Iterator[None]:
        """Go on when the database is away or the lease lost: expiry does what could not be done here."""
        try:
            yield
        except (OperationalError, StaleLeaseError) as error:
            log.warning("attempt.left_to_expire", error=type(error).__name__)

    def _send(self, order: StartJob | StopJob | UrlsGranted) -> None:
        if self._trainer is not None:
            self._trainer.send(order)


def _lease_of(job: Job) -> Lease:
    assert job.lease_token is not None
    return Lease(job_id=job.id, tenant_id=job.tenant_id, token=job.lease_token)


def _pools_of(base: BaseModelRow) -> tuple[str, ...]:
    return tuple(pool_name(base.id, quantization) for quantization in (None, *base.quantizations))


def _load_order(base: BaseModelRow, pool: str, *, cache_dir: str) -> LoadBase:
    quantization = next(q for q in (None, *base.quantizations) if pool_name(base.id, q) == pool)
    return LoadBase.model_validate(
        {
            "base_model_id": base.id,
            "source_kind": base.source["kind"],
            "location": base.source["location"],
            "revision": base.source["revision"],
            "dtype": base.dtype,
            "quantization": quantization,
            "target_modules": tuple(base.target_modules),
            "chat_template": base.chat_template,
            "slots": base.slots,
            "max_rank": base.max_rank,
            "max_tokens_per_step": base.max_tokens_per_step,
            "cache_dir": cache_dir,
        }
    )


def _record_step(session: Session, lease: Lease, report: StepDone) -> None:
    record = StepRecord(
        step=report.step,
        train_loss=report.train_loss,
        train_accuracy=report.train_accuracy,
        learning_rate=report.learning_rate,
        grad_norm=report.grad_norm,
        num_tokens=report.num_tokens,
    )
    attempts.record_step(session, lease, record=record, total_steps=report.total_steps)
