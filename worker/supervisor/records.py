"""Writes reports into the database. Each kind of report has one call that records it, in the caller's transaction."""

from __future__ import annotations

from core.db.session import ServiceSession
from core.domain.failures import Failure
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.leases import Lease
from core.services import attempts, checkpoints, observations, resume_points
from core.services.logs import record_log_line
from core.services.observations import StepRecord
from worker.messages import (
    UNCOUNTED_CODES,
    CheckpointSaved,
    DatasetsRead,
    EvaluationDone,
    JobFailed,
    JobLogged,
    JobStarted,
    JobSucceeded,
    JobWarned,
    JobYielded,
    ResumePointSaved,
    StepDone,
    StepSkipped,
)
from worker.supervisor.artifacts import Proof

ProgressReport = DatasetsRead | JobStarted | StepDone | StepSkipped | EvaluationDone | JobWarned | JobLogged


def record_progress(session: ServiceSession, lease: Lease, report: ProgressReport) -> tuple[str, ...]:
    """Record a job's progress. Return the object prefixes that no row names any more. Raises StaleLeaseError."""
    match report:
        case DatasetsRead(training=training, validation=validation):
            attempts.record_datasets(session, lease, datasets={"training": training, "validation": validation})
        case JobStarted(step=step, total_steps=total_steps):
            return resume_points.begin_steps(session, lease, step=step, total_steps=total_steps)
        case StepDone():
            observations.record_step(session, lease, record=_step_record(report), total_steps=report.total_steps)
        case StepSkipped(step=step, total_steps=total_steps):
            observations.record_skipped_step(session, lease, step=step, total_steps=total_steps)
        case EvaluationDone(step=step, loss=loss, token_accuracy=token_accuracy):
            observations.record_evaluation(session, lease, step=step, loss=loss, token_accuracy=token_accuracy)
        case JobWarned(message=message):
            attempts.record_message(session, lease, message=message, level="warn")
        case JobLogged(name=name, details=details):
            record_log_line(session, lease.token, name=name, level="info", details=details)
    return ()


def record_proof(session: ServiceSession, proof: Proof, *, result_filename: str) -> tuple[str, ...]:
    """Publish what a trainer has stored, or end the attempt as it reports. Returns and raises as record_progress."""
    lease, report = proof.lease, proof.report
    match report:
        case CheckpointSaved():
            (artifact,) = proof.artifacts
            return checkpoints.record_checkpoint(
                session, lease, step=report.step, artifact=artifact, metrics=report.metrics.by_name()
            )
        case ResumePointSaved():
            (artifact,) = proof.artifacts
            return resume_points.record_resume_point(session, lease, step=report.step, artifact=artifact)
        case JobYielded():
            attempts.requeue_attempt(session, lease)
        case JobFailed() if report.code in UNCOUNTED_CODES:
            attempts.postpone_attempt(session, lease, failure=_failure_of(report))
        case JobFailed():
            attempts.fail_attempt(session, lease, failure=_failure_of(report), is_job_fault=report.is_job_fault)
        case JobSucceeded():
            return _record_success(session, proof, report, result_filename=result_filename)
    return ()


def _failure_of(report: JobFailed) -> Failure:
    return Failure(code=report.code, message=report.message, param=report.param)


def _record_success(
    session: ServiceSession, proof: Proof, report: JobSucceeded, *, result_filename: str
) -> tuple[str, ...]:
    adapter, result = proof.artifacts
    result_file = NewFile(
        id=new_id(),
        filename=result_filename,
        purpose="fine-tune-results",
        object_key=result.object_prefix + report.result_file.name,
        size_bytes=report.result_file.size_bytes,
        sha256=report.result_file.sha256,
    )
    attempts.succeed_attempt(
        session, proof.lease, adapter=adapter, result_file=result_file, trained_tokens=report.trained_tokens
    )
    return resume_points.forget_resume_points(session, proof.lease)


def _step_record(report: StepDone) -> StepRecord:
    return StepRecord(
        step=report.step,
        train_loss=report.train_loss,
        train_token_accuracy=report.train_token_accuracy,
        learning_rate=report.learning_rate,
        grad_norm=report.grad_norm,
        num_tokens=report.num_tokens,
    )
