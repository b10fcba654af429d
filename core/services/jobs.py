"""Jobs as their tenants see them: submit, look, cancel.

Submitting checks everything that can be checked without a GPU, resolves every "auto", and announces the work in the
same transaction: the queued row is the outbox, NOTIFY only makes it quicker.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from sqlalchemy import and_, case, event, func, or_, select, text, update
from sqlalchemy.orm import Session

from core.crashpoints import CrashPoint, reach
from core.db.models import Attempt, BaseModelRow, File, Job, Tenant
from core.domain.errors import ConflictError, InvalidRequestError, NotFoundError, RateLimitedError
from core.domain.ids import IdKind, format_id, new_id
from core.domain.jobs import UNFINISHED_STATUSES, AttemptOutcome, JobStatus, is_fine_tuned_model, pool_name
from core.domain.training import (
    ALL_LINEAR,
    BASE_LEARNING_RATE,
    AdapterConfig,
    Frozen,
    LearningRateSchedule,
    Quantization,
    TrainingSpec,
    count_steps,
    resolve_batch_size,
    resolve_epochs,
    resolve_learning_rate,
)
from core.services.adapters import find_adapter
from core.services.base_models import get_base_model
from core.services.events import record_event
from core.services.files import get_file
from core.services.pages import Page

WAKE_CHANNEL = "espalier_wake"


class JobRequest(Frozen):
    """A request to train one adapter, its form checked; None stands for "auto" or a default."""

    base_model_id: str
    training_file_id: uuid.UUID
    validation_file_id: uuid.UUID | None = None
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    priority: int = 0
    quantization: Quantization | None = None
    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    learning_rate: float | None = None
    learning_rate_schedule: LearningRateSchedule = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_seq_len: int | None = None
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    use_rslora: bool = False


def submit_job(
    session: Session, tenant_id: uuid.UUID, *, request: JobRequest, request_hash: bytes | None = None
) -> Job:
    """Check a request and queue it. Raises InvalidRequestError naming the field, or RateLimitedError by quota."""
    base = _get_trainable(session, tenant_id, model=request.base_model_id)
    training_file = _get_dataset(session, tenant_id, file_id=request.training_file_id, param="training_file")
    if request.validation_file_id is not None:
        _get_dataset(session, tenant_id, file_id=request.validation_file_id, param="validation_file")
    _check_quantization(base, request.quantization)
    _check_queue_quota(session, tenant_id)
    spec = resolve_spec(request, base=base, num_examples=training_file.num_examples)
    job = Job(
        id=new_id(),
        tenant_id=tenant_id,
        base_model_id=base.id,
        quantization=request.quantization,
        pool=pool_name(base.id, request.quantization),
        training_file_id=request.training_file_id,
        validation_file_id=request.validation_file_id,
        suffix=request.suffix,
        job_metadata=request.metadata,
        spec=spec.model_dump(mode="json"),
        request_hash=request_hash,
        total_steps=count_steps(spec, training_file.num_examples),
        priority=request.priority,
        status=JobStatus.QUEUED,
    )
    session.add(job)
    session.flush()
    record_event(session, job, message="Validated the files and queued the job.")
    announce_work(session, job.pool)
    event.listen(session, "after_commit", lambda _session: reach(CrashPoint.POST_INSERT), once=True)
    session.refresh(job)
    return job


def resolve_spec(request: JobRequest, *, base: BaseModelRow, num_examples: int) -> TrainingSpec:
    """Return the training with every "auto" a number. Raises InvalidRequestError against the base's limits."""
    if not 1 <= request.rank <= base.max_rank:
        raise _invalid(f"adapter.rank is {request.rank}; {base.id} takes 1 to {base.max_rank}.", "adapter.rank")
    max_seq_len = request.max_seq_len or base.max_seq_len
    if max_seq_len > base.max_seq_len:
        raise _invalid(f"max_seq_len is {max_seq_len}; {base.id} takes at most {base.max_seq_len}.", "max_seq_len")
    learning_rate = request.learning_rate or resolve_learning_rate(request.learning_rate_multiplier or 1.0)
    if not math.isfinite(learning_rate):
        raise _invalid("The learning rate is not a finite number.", "learning_rate")
    return TrainingSpec(
        adapter=AdapterConfig(
            rank=request.rank,
            alpha=request.alpha,
            dropout=request.dropout,
            target_modules=_resolve_target_modules(request, base),
            use_rslora=request.use_rslora,
        ),
        n_epochs=request.n_epochs or resolve_epochs(num_examples),
        batch_size=request.batch_size or resolve_batch_size(num_examples),
        learning_rate=learning_rate,
        learning_rate_multiplier=learning_rate / BASE_LEARNING_RATE,
        learning_rate_schedule=request.learning_rate_schedule,
        warmup_ratio=request.warmup_ratio,
        weight_decay=request.weight_decay,
        max_grad_norm=request.max_grad_norm,
        max_seq_len=max_seq_len,
        seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
    )


def get_job(session: Session, tenant_id: uuid.UUID, *, job_id: uuid.UUID) -> Job:
    job = session.scalar(select(Job).where(Job.tenant_id == tenant_id, Job.id == job_id))
    if job is None:
        raise NotFoundError(f"Could not find fine tune: {format_id(IdKind.JOB, job_id)}")
    return job


def list_jobs(
    session: Session,
    tenant_id: uuid.UUID,
    *,
    after: uuid.UUID | None,
    limit: int,
    metadata: dict[str, str] | None = None,
) -> Page[Job]:
    """Return the tenant's jobs, newest first. `metadata` keeps those that carry all the pairs; {} those with none."""
    query = select(Job).where(Job.tenant_id == tenant_id)
    if after is not None:
        query = query.where(Job.id < after)
    if metadata is not None:
        query = query.where(Job.job_metadata.contains(metadata) if metadata else Job.job_metadata == {})
    rows: Sequence[Job] = session.scalars(query.order_by(Job.id.desc()).limit(limit + 1)).all()
    return Page.cut(rows, limit)


def cancel_job(session: Session, tenant_id: uuid.UUID, *, job_id: uuid.UUID) -> Job:
    """End a job as cancelled, whatever it is doing; its worker learns so at its next heartbeat.

    Cancelling a cancelled job changes nothing. Raises ConflictError when it has succeeded or failed.
    """
    job = get_job(session, tenant_id, job_id=job_id)
    cancelled = session.scalar(
        update(Job)
        .where(Job.tenant_id == tenant_id, Job.id == job_id, Job.status.in_(UNFINISHED_STATUSES))
        .values(
            status=JobStatus.CANCELLED,
            lease_token=None,
            lease_until=None,
            pause_requested_at=None,
            finished_at=func.now(),
        )
        .returning(Job.id)
    )
    session.refresh(job)
    if cancelled is None and job.status != JobStatus.CANCELLED:
        raise ConflictError(f"The job has already {job.status}; only an unfinished job can be cancelled.")
    if cancelled is not None:
        session.execute(
            update(Attempt)
            .where(Attempt.tenant_id == tenant_id, Attempt.job_id == job_id, Attempt.outcome.is_(None))
            .values(outcome=AttemptOutcome.CANCELLED, ended_at=func.now())
        )
        record_event(session, job, message="The job was cancelled.")
    return job


def pause_job(session: Session, tenant_id: uuid.UUID, *, job_id: uuid.UUID) -> Job:
    """Pause a queued job at once, and a running one as soon as its worker has stored where it stands.

    Pausing a paused job changes nothing. Raises ConflictError when the job has ended.
    """
    job = get_job(session, tenant_id, job_id=job_id)
    is_queued, is_running = Job.status == JobStatus.QUEUED, Job.status == JobStatus.RUNNING
    can_pause = or_(is_queued, and_(is_running, Job.pause_requested_at.is_(None)))
    changed = session.scalar(
        update(Job)
        .where(Job.tenant_id == tenant_id, Job.id == job_id, can_pause)
        .values(
            status=case((is_queued, JobStatus.PAUSED), else_=Job.status),
            pause_requested_at=case((is_running, func.now()), else_=None),
        )
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    session.refresh(job)
    if changed is not None:
        is_paused = job.status == JobStatus.PAUSED
        record_event(session, job, message="The job is paused." if is_paused else "The job will pause.")
    elif job.status not in (JobStatus.RUNNING, JobStatus.PAUSED):
        raise ConflictError(f"The job is {job.status}; only a queued or running job can be paused.")
    return job


def resume_job(session: Session, tenant_id: uuid.UUID, *, job_id: uuid.UUID) -> Job:
    """Queue a paused job again, at its old place; a running one that was about to pause goes on.

    Resuming a job that is queued or running changes nothing. Raises ConflictError when the job has ended.
    """
    job = get_job(session, tenant_id, job_id=job_id)
    is_paused = Job.status == JobStatus.PAUSED
    changed = session.scalar(
        update(Job)
        .where(Job.tenant_id == tenant_id, Job.id == job_id, or_(is_paused, Job.pause_requested_at.is_not(None)))
        .values(status=case((is_paused, JobStatus.QUEUED), else_=Job.status), pause_requested_at=None)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    session.refresh(job)
    if changed is not None:
        record_event(session, job, message="The job was resumed.")
        announce_work(session, job.pool)
    elif job.status not in (JobStatus.QUEUED, JobStatus.RUNNING):
        raise ConflictError(f"The job is {job.status}; only a paused job can be resumed.")
    return job


def announce_work(session: Session, pool: str) -> None:
    """Tell the schedule process, once this transaction is committed, that a pool has work."""
    session.execute(text("select pg_notify(:channel, :pool)"), {"channel": WAKE_CHANNEL, "pool": pool})


def _get_trainable(session: Session, tenant_id: uuid.UUID, *, model: str) -> BaseModelRow:
    if not is_fine_tuned_model(model):
        return get_base_model(session, tenant_id, base_model_id=model)
    adapter = find_adapter(session, tenant_id, name=model)
    raise InvalidRequestError(
        f"Training on from a fine-tuned model is not supported yet. Start from its base, {adapter.base_model_id!r}.",
        code="warm_start_unsupported",
        param="model",
    )


def _get_dataset(session: Session, tenant_id: uuid.UUID, *, file_id: uuid.UUID, param: str) -> File:
    try:
        row = get_file(session, tenant_id, file_id=file_id, param=param)
    except NotFoundError as error:
        raise InvalidRequestError(error.message, code="file_not_found", param=param) from error
    if row.purpose != "fine-tune":
        raise _invalid(f"The file's purpose is {row.purpose!r}; upload it with purpose 'fine-tune'.", param)
    if row.status == "error":
        raise InvalidRequestError(
            f"The file cannot be trained on: {row.status_details} Upload a corrected file.",
            code="invalid_file",
            param=param,
        )
    return row


def _check_quantization(base: BaseModelRow, quantization: str | None) -> None:
    if quantization is not None and quantization not in base.quantizations:
        known = ", ".join(base.quantizations) or "none"
        raise _invalid(f"{base.id} cannot be quantized to {quantization!r}; allowed: {known}.", "quantization")


def _check_queue_quota(session: Session, tenant_id: uuid.UUID) -> None:
    num_queued = select(func.count()).where(Job.tenant_id == tenant_id, Job.status == JobStatus.QUEUED)
    quota = select(Tenant.max_queued).where(Tenant.id == tenant_id)
    if session.scalars(num_queued).one() >= session.scalars(quota).one():
        raise RateLimitedError("Too many jobs are queued; wait until some have started.", code="queue_quota_exceeded")


def _resolve_target_modules(request: JobRequest, base: BaseModelRow) -> tuple[str, ...]:
    if request.target_modules == ALL_LINEAR:
        return tuple(sorted(base.target_modules))
    lacking = sorted(set(request.target_modules) - set(base.target_modules))
    if lacking or not request.target_modules:
        raise _invalid(
            f"{base.id} has no linear module named {', '.join(map(repr, lacking)) or '(none given)'}; "
            f"it has {', '.join(sorted(base.target_modules))}.",
            "adapter.target_modules",
        )
    return tuple(sorted(set(request.target_modules)))


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param)
