"""Jobs as their tenants use them: get, list, cancel, pause, resume, delete.

What each verb makes of a job, by its status:

| status | cancel | pause | resume | delete |
|---|---|---|---|---|
| queued | cancelled | paused | nothing changes | ConflictError |
| running | cancelled | about to pause, if the queue has a place | nothing changes | ConflictError |
| running, about to pause | cancelled | nothing changes | keeps running | ConflictError |
| paused | cancelled | nothing changes | queued, at its old place | ConflictError |
| succeeded, failed | ConflictError | ConflictError | ConflictError | deleted |
| cancelled | nothing changes | ConflictError | ConflictError | deleted |

A worker learns at its next heartbeat that its job is cancelled or about to pause. It stores the job's state before the
job is paused.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import and_, bindparam, case, delete, func, literal, or_, select, text, update

from core.db.locks import lock_for_tenant
from core.db.models import Adapter, Attempt, Checkpoint, File, IdempotencyKey, Job
from core.db.session import TenantSession, WorkWriter
from core.domain.errors import ConflictError
from core.domain.ids import IdKind, not_found
from core.domain.jobs import UNFINISHED_STATUSES, AttemptOutcome, JobStatus
from core.domain.values import Page
from core.services.events import record_event
from core.services.quotas import check_queue, has_queue_place

_PAUSING = "The job pauses at its next resume point."
WAKE_CHANNEL = "espalier_wake"
# Built once, because building the query takes longer than running it.
_ONE_JOB = select(Job).where(
    Job.tenant_id == bindparam("tenant_id"), Job.id == bindparam("job_id"), Job.deleted_at.is_(None)
)
_ONE_JOB_LOCKED = _ONE_JOB.with_for_update(key_share=True).execution_options(populate_existing=True)


def get_job(session: WorkWriter, tenant_id: uuid.UUID, *, job_id: uuid.UUID, lock: bool = False) -> Job:
    """Return a tenant's job. With `lock` it is locked until the transaction ends.

    Raises NotFoundError.
    """
    query = _ONE_JOB_LOCKED if lock else _ONE_JOB
    job: Job | None = session.scalar(query, {"tenant_id": tenant_id, "job_id": job_id})
    if job is None:
        raise not_found(IdKind.JOB, job_id)
    return job


def list_jobs(
    session: TenantSession,
    tenant_id: uuid.UUID,
    *,
    after: uuid.UUID | None,
    limit: int,
    metadata: dict[str, str] | None = None,
) -> Page[Job]:
    """Return the tenant's jobs, newest first. `metadata` selects jobs with all of these pairs; {} those without any."""
    query = select(Job).where(Job.tenant_id == tenant_id, Job.deleted_at.is_(None))
    if after is not None:
        query = query.where(Job.id < after)
    if metadata is not None:
        query = query.where(Job.job_metadata.contains(metadata) if metadata else Job.job_metadata == {})
    rows: Sequence[Job] = session.scalars(query.order_by(Job.id.desc()).limit(limit + 1)).all()
    return Page.cut(rows, limit)


def cancel_job(session: WorkWriter, tenant_id: uuid.UUID, *, job_id: uuid.UUID) -> Job:
    """End a job as cancelled in any unfinished status. Its worker learns so at its next heartbeat.

    Cancelling a cancelled job changes nothing. Raises ConflictError when it has succeeded or failed.
    """
    job = get_job(session, tenant_id, job_id=job_id, lock=True)
    if job.status == JobStatus.CANCELLED:
        return job
    if job.status not in UNFINISHED_STATUSES:
        raise ConflictError(f"The job has already {job.status}; only an unfinished job can be cancelled.")
    # Not now(): while this transaction waited for the lock, the job's worker may have written rows with a later time.
    ended_at = session.scalar(
        update(Job)
        .where(Job.tenant_id == tenant_id, Job.id == job_id)
        .values(
            status=JobStatus.CANCELLED,
            lease_token=None,
            lease_until=None,
            pause_requested_at=None,
            finished_at=func.clock_timestamp(),
        )
        .returning(Job.finished_at)
    )
    session.execute(
        update(Attempt)
        .where(Attempt.tenant_id == tenant_id, Attempt.job_id == job_id, Attempt.outcome.is_(None))
        .values(outcome=AttemptOutcome.CANCELLED, ended_at=ended_at)
    )
    session.refresh(job)
    record_event(session, job, message="The job was cancelled.")
    return job


def pause_job(session: TenantSession, tenant_id: uuid.UUID, *, job_id: uuid.UUID) -> Job:
    """Pause a queued job at once, and a running one as soon as its worker has stored its state.

    A running job needs a free place in the queue, and takes it now. Pausing a paused job changes nothing. Raises
    ConflictError when the job has ended, RateLimitedError by quota.
    """
    lock_for_tenant(session, tenant_id, purpose="queue")
    job = get_job(session, tenant_id, job_id=job_id)
    is_queued, is_running = Job.status == JobStatus.QUEUED, Job.status == JobStatus.RUNNING
    can_pause = or_(is_queued, and_(is_running, Job.pause_requested_at.is_(None), has_queue_place(literal(tenant_id))))
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
        record_event(session, job, message="The job is paused." if is_paused else _PAUSING)
    elif job.status not in (JobStatus.RUNNING, JobStatus.PAUSED):
        raise ConflictError(f"The job is {job.status}; only a queued or running job can be paused.")
    elif job.status == JobStatus.RUNNING and job.pause_requested_at is None:
        check_queue(session, tenant_id)
        return pause_job(session, tenant_id, job_id=job_id)  # the job's place in the queue is free again
    return job


def resume_job(session: TenantSession, tenant_id: uuid.UUID, *, job_id: uuid.UUID) -> Job:
    """Queue a paused job again at its old place. A running job that was about to pause keeps running.

    Its wait counts from now, without the time of the pause. A retry delay that has not passed yet stays. Resuming a
    queued or running job changes nothing. Raises ConflictError when the job has ended.
    """
    job = get_job(session, tenant_id, job_id=job_id)
    is_paused = Job.status == JobStatus.PAUSED
    changed = session.scalar(
        update(Job)
        .where(Job.tenant_id == tenant_id, Job.id == job_id, or_(is_paused, Job.pause_requested_at.is_not(None)))
        .values(
            status=case((is_paused, JobStatus.QUEUED), else_=Job.status),
            run_after=case((is_paused, func.greatest(Job.run_after, func.now())), else_=Job.run_after),
            pause_requested_at=None,
        )
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


def delete_job(session: TenantSession, tenant_id: uuid.UUID, *, job_id: uuid.UUID) -> None:
    """Delete an ended job with all that it has made. It is invisible from now on, and the schedule erases it.

    Raises ConflictError while it has not ended.
    """
    job = get_job(session, tenant_id, job_id=job_id, lock=True)
    if job.status in UNFINISHED_STATUSES:
        raise ConflictError(f"The job is {job.status}. Cancel it first.", code="job_not_ended")
    for made in (Adapter, Checkpoint):
        of_job = (made.tenant_id == tenant_id, made.job_id == job_id, made.deleted_at.is_(None))
        session.execute(update(made).where(*of_job).values(deleted_at=func.now()))
    result = (File.tenant_id == tenant_id, File.id == job.result_file_id, File.deleted_at.is_(None))
    session.execute(update(File).where(*result).values(deleted_at=func.now()))
    session.execute(
        delete(IdempotencyKey).where(IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.job_id == job_id)
    )
    session.execute(update(Job).where(Job.tenant_id == tenant_id, Job.id == job_id).values(deleted_at=func.now()))


def announce_work(session: WorkWriter, pool: str) -> None:
    """Tell the schedule, once this transaction is committed, that a pool has work."""
    session.execute(text("select pg_notify(:channel, :pool)"), {"channel": WAKE_CHANNEL, "pool": pool})
