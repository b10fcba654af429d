"""Attempts, and how each one ends.

Every end is guarded by the lease token (core.services.leases). So an attempt ends once, and only a job's newest attempt
can end the job. A job has `MAX_ATTEMPTS` attempts. An end that is not the job's fault takes its attempt back
(`_take_back_count`), but at most `MAX_UNCOUNTED` times in a row without a new step, so that every job ends.

| end | function | counted? | next |
|---|---|---|---|
| success | `succeed_attempt` | yes | the job has succeeded |
| failure by the job's own fault | `fail_attempt` | yes | the job has failed |
| another failure | `fail_attempt` | yes | queued again after a pause; failed when no attempt is left |
| the trainer died with this job alone in it | `fail_attempt` | yes | the same, and the job is tried alone |
| the trainer died with several jobs in it | `suspect_attempt` | no | queued again, and the job is tried alone |
| a server was away | `postpone_attempt` | no | queued again after a pause |
| the worker gives the job back, or lends its slot | `requeue_attempt` | no | queued again at once |
| the tenant asked for a pause | `requeue_attempt` | no, without a limit | paused |
| the lease expired | `expire_leases` | yes | queued again after a pause; failed when no attempt is left |
| the same, and its worker is alive after all | `uncount_lost_attempt` | no longer | as it is by then |

Beyond the limit of `MAX_UNCOUNTED`, a "no" becomes a "yes", and the job fails when no attempt is left. Where a pause
was asked for, a job that would be queued is paused instead. When a worker calls which function after its trainer's
death is in worker.supervisor.deaths.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update

from core.db.models import Adapter, Attempt, Job
from core.db.session import ServiceSession
from core.domain.dataset_counts import DatasetCounts, DatasetName, describe_omissions
from core.domain.duties import Duty
from core.domain.failures import LEASE_LOST, NO_PROGRESS, WORKER_LOST, Failure
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.jobs import MAX_UNCOUNTED, TERMINAL_STATUSES, AttemptOutcome, JobStatus, retry_delay_seconds
from core.domain.leases import Lease, StaleLeaseError
from core.domain.values import StoredArtifact
from core.services.adapters import name_adapter
from core.services.events import record_event
from core.services.files import create_file
from core.services.jobs import announce_work
from core.services.leases import is_held, lock_held
from core.services.set_asides import is_in_reach, setting_aside
from core.services.turns import is_lending


def record_datasets(
    session: ServiceSession, lease: Lease, *, datasets: Mapping[DatasetName, DatasetCounts | None]
) -> None:
    """Store what became of the job's rows, and warn of rows that are not trained on, unless an attempt warned before.

    Every attempt reads the same files with the same result.
    """
    job = lock_held(session, lease)
    before = job.datasets or {}
    job.datasets = {name: counts.model_dump() if counts else None for name, counts in datasets.items()}
    for name, counts in datasets.items():
        warning = describe_omissions(counts, file=name, max_seq_len=job.spec["max_seq_len"]) if counts else None
        if warning is not None and job.datasets[name] != before.get(name):
            record_event(session, job, level="warn", message=warning)


def record_message(session: ServiceSession, lease: Lease, *, message: str, level: str) -> None:
    record_event(session, lock_held(session, lease), message=message, level="warn" if level == "warn" else "info")


def succeed_attempt(
    session: ServiceSession, lease: Lease, *, adapter: StoredArtifact, result_file: NewFile, trained_tokens: int
) -> None:
    """Publish the adapter and end the job: the one guarded UPDATE that makes the result real."""
    job = lock_held(session, lease)
    name = name_adapter(session, job)
    result = create_file(session, job.tenant_id, new=result_file)
    session.add(
        Adapter(
            id=new_id(),
            tenant_id=job.tenant_id,
            job_id=job.id,
            name=name,
            base_model_id=job.base_model_id,
            object_prefix=adapter.object_prefix,
            files=adapter.dump_files(),
            size_bytes=adapter.size_bytes,
        )
    )
    _leave_running(
        session,
        lease,
        status=JobStatus.SUCCEEDED,
        fine_tuned_model=name,
        trained_tokens=trained_tokens,
        result_file_id=result.id,
        finished_at=func.clock_timestamp(),
    )
    _end_attempt(session, lease, outcome=AttemptOutcome.SUCCEEDED)
    record_event(session, job, message=f"New fine-tuned model created: {name}")
    record_event(session, job, message="The job has successfully completed.")


def fail_attempt(
    session: ServiceSession, lease: Lease, *, failure: Failure, is_job_fault: bool, is_suspect: bool = False
) -> None:
    """End a failed attempt. The job's own fault is final. After another one it is tried again while attempts are left.

    `is_suspect`: the trainer died with this job alone, so it is tried alone next.
    """
    job = lock_held(session, lease)
    if is_suspect:
        job.suspect_step = job.trained_steps
    _end_attempt(session, lease, outcome=AttemptOutcome.FAILED, failure=failure)
    _retry_or_fail(session, job, lease, failure=failure, is_final=is_job_fault)


def requeue_attempt(session: ServiceSession, lease: Lease) -> None:
    """Give a job back before its end: paused if its tenant asked for that, else queued. The attempt does not count."""
    job = lock_held(session, lease)
    if job.pause_requested_at is not None:
        job.attempt_count -= 1  # without a limit, because its tenant asks for it
        _end_attempt(session, lease, outcome=AttemptOutcome.PAUSED)
        _leave_running(session, lease, status=JobStatus.PAUSED, run_after=func.now())
        record_event(session, job, message="The job is paused.")
        return
    is_lent = is_lending(session, lease.token)
    _end_attempt(session, lease, outcome=AttemptOutcome.LENT if is_lent else AttemptOutcome.PREEMPTED)
    if not _take_back_count(job):
        _retry_or_fail(session, job, lease, failure=NO_PROGRESS, is_final=False)
        return
    _leave_running(session, lease, status=JobStatus.QUEUED, run_after=func.now())
    reason = "Other organizations have their turn" if is_lent else "The worker gives the job back"
    record_event(session, job, message=f"{reason}; it is queued again.")
    announce_work(session, job.pool)


def postpone_attempt(session: ServiceSession, lease: Lease, *, failure: Failure) -> None:
    """End an attempt because a server is away. It does not count, and the job is tried again soon."""
    job = lock_held(session, lease)
    _take_back_count(job)
    _end_attempt(session, lease, outcome=AttemptOutcome.FAILED, failure=failure)
    _retry_or_fail(session, job, lease, failure=failure, is_final=False)


def suspect_attempt(session: ServiceSession, lease: Lease, *, failure: Failure) -> None:
    """End an attempt whose trainer died with several jobs in it: not charged, and tried alone next."""
    job = lock_held(session, lease)
    job.suspect_step = job.trained_steps
    job.num_suspicions += 1
    _end_attempt(session, lease, outcome=AttemptOutcome.FAILED, failure=failure)
    if not _take_back_count(job):
        _retry_or_fail(session, job, lease, failure=failure, is_final=False)
        return
    status = JobStatus.QUEUED if job.pause_requested_at is None else JobStatus.PAUSED
    _leave_running(session, lease, status=status, run_after=func.now())
    told = f"{failure.message} Several jobs were in it; this attempt does not count, and the job is tried alone next."
    record_event(session, job, level="warn", message=told)
    announce_work(session, job.pool)


def acquit_job(session: ServiceSession, lease: Lease) -> bool:
    """Let a job train beside others again. Return whether another job of its pool waits to be tried alone."""
    job = lock_held(session, lease)
    job.suspect_step = None
    waiting = select(Job.id).where(
        Job.pool == job.pool, Job.status == JobStatus.QUEUED, Job.suspect_step.is_not(None), Job.run_after <= func.now()
    )
    return session.scalar(waiting.limit(1)) is not None


def uncount_lost_attempt(session: ServiceSession, lease: Lease) -> bool:
    """Take back the count of an attempt that was ended as lost. Return whether that was possible.

    Its worker is alive and says so itself: it was cut off from the database, or was suspended, but the job did not kill
    it.
    """
    job = session.scalar(select(Job).where(Job.id == lease.job_id).with_for_update())
    if job is None or job.status in TERMINAL_STATUSES:
        return False
    is_lost = (Attempt.lease_token == lease.token, Attempt.error["code"].astext == WORKER_LOST.code)
    attempt = session.scalar(select(Attempt).where(*is_lost))
    if attempt is None or not _take_back_count(job):
        return False
    attempt.error = LEASE_LOST.model_dump()
    record_event(session, job, message="Its worker had only lost touch; that attempt does not count.")
    return True


def record_departure(session: ServiceSession, lease: Lease, *, seconds_ago: float) -> None:
    """Record when an attempt left the device, whether or not it has ended. The first record stays."""
    session.execute(
        update(Attempt)
        .where(Attempt.lease_token == lease.token, Attempt.left_device_at.is_(None))
        .values(left_device_at=func.now() - timedelta(seconds=seconds_ago))
    )


def expire_leases(session: ServiceSession, *, limit: int = 100) -> int:
    """Queue or fail the jobs whose workers did not prolong their leases in time. Return how many."""
    is_expired = func.coalesce(Job.lease_until, func.to_timestamp(0)) < func.now()
    expired = session.scalars(
        select(Job)
        .where(Job.status == JobStatus.RUNNING, is_expired, is_in_reach(Duty.EXPIRE, Job.id))
        .order_by(Job.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    num_expired = 0
    for job in expired:
        with setting_aside(session, Duty.EXPIRE, row_id=job.id, tenant_id=job.tenant_id) as expiry:
            _expire_lease(session, job)
        num_expired += expiry.is_done
    return num_expired


def _expire_lease(session: ServiceSession, job: Job) -> None:
    assert job.lease_token is not None
    lease = Lease(job_id=job.id, tenant_id=job.tenant_id, token=job.lease_token)
    _end_attempt(session, lease, outcome=AttemptOutcome.LOST, failure=WORKER_LOST)
    _retry_or_fail(session, job, lease, failure=WORKER_LOST, is_final=False)


def _leave_running(session: ServiceSession, lease: Lease, **values: Any) -> None:
    left = session.scalar(
        update(Job)
        .where(*is_held(lease))
        .values(lease_token=None, lease_until=None, pause_requested_at=None, **values)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    if left is None:
        raise StaleLeaseError("The lease is not held any more.")


def _end_attempt(
    session: ServiceSession, lease: Lease, *, outcome: AttemptOutcome, failure: Failure | None = None
) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.lease_token == lease.token)
        .values(
            outcome=outcome,
            error=None if failure is None else failure.model_dump(),
            ended_at=func.clock_timestamp(),
        )
    )


def _take_back_count(job: Job) -> bool:
    """Do not count the attempt that ends, unless too many in a row ended so without a new step. Return whether."""
    if job.num_uncounted >= MAX_UNCOUNTED:
        return False
    job.num_uncounted += 1
    job.attempt_count -= 1
    return True


def _retry_or_fail(session: ServiceSession, job: Job, lease: Lease, *, failure: Failure, is_final: bool) -> None:
    if is_final or job.attempt_count >= job.max_attempts:
        _leave_running(
            session, lease, status=JobStatus.FAILED, error=failure.model_dump(), finished_at=func.clock_timestamp()
        )
        record_event(session, job, level="error", message=f"The job has failed: {failure.message}")
        return
    delay = timedelta(seconds=retry_delay_seconds(job.attempt_count, num_uncounted=job.num_uncounted))
    if job.pause_requested_at is not None:
        _leave_running(session, lease, status=JobStatus.PAUSED, run_after=func.now() + delay)
        record_event(session, job, level="warn", message=f"{failure.message} The job is paused.")
        return
    _leave_running(session, lease, status=JobStatus.QUEUED, run_after=func.now() + delay)
    record_event(session, job, level="warn", message=f"{failure.message} It is queued again.")
    announce_work(session, job.pool)
