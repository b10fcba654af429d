"""Attempts as workers live them: claim, heartbeat, report, end; and expiry, which ends what a dead worker held.

Every write is guarded by the lease token (the fence): only the newest attempt of a running job may change the job, its
events, metrics and artifacts. StaleLeaseError means that this attempt is over and must stop at once.

An attempt that ends by nobody's fault is not counted: `_take_back_count` says so in each case, and bounds them all.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from core.db.models import LEASE_TOKENS, Adapter, Attempt, Checkpoint, Job, Observation, Tenant
from core.domain.dataset_counts import DatasetCounts, DatasetName, describe_loss
from core.domain.duties import Duty
from core.domain.errors import DomainError
from core.domain.ids import new_id
from core.domain.jobs import (
    MAX_UNCOUNTED,
    SUSPECT_PATIENCE_SECONDS,
    TERMINAL_STATUSES,
    AttemptOutcome,
    JobStatus,
    checkpoint_model_name,
    fine_tuned_model_name,
    retry_delay_seconds,
)
from core.domain.scheduling import SLOT_SECONDS
from core.services.charges import charge_tenant, estimate_charge
from core.services.events import record_event
from core.services.files import NewFile, create_file
from core.services.jobs import announce_work
from core.services.set_asides import is_in_reach, setting_aside
from core.services.turns import IS_IN_REACH, IS_USABLE, MAY_START, is_lending

# The fairest tenant with a claimable job in the pool: least decayed usage per weight, below its quota. `queues` has the
# tenants that have queued jobs in that order, so that mostly its first row is the answer, however many tenants and jobs
# there are. The tenant's row is locked so that two workers never both pass its quota; whoever submits jobs
# of the tenant meanwhile is not in the way.
_PICK = text(f"""
select t.id as tenant_id, c.id as job_id
from queues q
join tenants t on t.id = q.tenant_id
cross join lateral (
    select j.id from jobs j
    where j.pool = q.pool and j.tenant_id = q.tenant_id and j.status = 'queued' and j.run_after <= now()
      and j.suspect_step is null and {IS_IN_REACH}
    order by j.priority desc, j.id limit 1
) c
where q.pool = :pool and q.num_queued > 0 and {MAY_START}
order by q.rank, q.tenant_id
limit 1
for no key update of t skip locked
""")  # noqa: S608 (of constants)


# A job that may have killed its trainer runs alone: an idle worker takes it at once and before any other job. Where no
# worker is ever idle, a busy one takes it after a while, and gives back what it holds. It does so in the order of fair
# share: no tenant with a lower score waits for a slot there or holds one.
_PICK_SUSPECT = text(f"""
select t.id as tenant_id, j.id as job_id
from jobs j join tenants t on t.id = j.tenant_id
where j.pool = :pool and j.status = 'queued' and j.suspect_step is not null
  and j.run_after <= now() - make_interval(secs => :patience) and {MAY_START} and {IS_IN_REACH}
  and ((:is_idle and (
    select a.outcome from attempts a where a.job_id = j.id order by a.lease_token desc limit 1) is distinct from 'lent')
  or not exists (
    select from tenants o
    where o.id <> t.id
      and share_rank(o.usage + o.lift, o.usage_at, o.weight) < share_rank(t.usage + t.lift, t.usage_at, t.weight)
      and o.id in (
        select q.tenant_id from queues q where q.pool = :pool and q.num_queued > 0
        union all select a.tenant_id from attempts a where a.worker_name = :worker and a.outcome is null)))
order by j.id
limit 1
for no key update of t skip locked
""")  # noqa: S608 (of constants)

# Nobody is woken for a base that cannot be used, or that each worker alive has just failed to load: they try again by
# themselves.
_MAY_BE_LOADED = f"""
{IS_USABLE} and (not exists (select from workers w where p.name = any (w.pools) and w.alive_until > now())
    or exists (select from workers w where p.name = any (w.pools) and w.alive_until > now()
      and not jsonb_exists(w.refusals, p.name)))
"""  # noqa: S608 (of constants)
_CLAIMABLE_POOLS = text(f"""
select p.name from (select distinct pool as name from queues where num_queued > 0) p
where {_MAY_BE_LOADED} and exists (
    select from queues q join tenants t on t.id = q.tenant_id
    where q.pool = p.name and q.num_queued > 0 and {MAY_START} and exists (
        select from jobs j
        where j.pool = q.pool and j.tenant_id = q.tenant_id and j.status = 'queued' and j.run_after <= now()
          and {IS_IN_REACH}
    )
)
order by p.name
""")  # noqa: S608 (of constants)


# So many jobs that cannot be claimed may one claim come upon; the next goes on from there.
_MAX_CLAIM_TRIES = 10


_WORKER_LOST = {"code": "worker_lost", "message": "The worker was lost while it trained this job.", "param": None}
_CUT_OFF = {
    "code": "lease_lost",
    "message": "The worker lost touch with the database and stopped itself.",
    "param": None,
}
_NO_PROGRESS = {
    "code": "no_progress",
    "message": f"The job was interrupted more than {MAX_UNCOUNTED} times in a row and came to no new step.",
    "param": None,
}


class StaleLeaseError(DomainError):
    """This attempt no longer holds the job: another outcome, or another worker, came first."""

    default_code = "stale_lease"


@dataclass(frozen=True)
class Lease:
    """One worker's hold on one job, fenced by `token`."""

    job_id: uuid.UUID
    tenant_id: uuid.UUID
    token: int


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one optimizer step, as they are stored and shown."""

    step: int
    train_loss: float
    train_accuracy: float
    learning_rate: float
    grad_norm: float
    num_tokens: int


@dataclass(frozen=True)
class StoredArtifact:
    """Files under one object prefix, each `{name, size_bytes, sha256}`, verified by reading them back."""

    object_prefix: str
    files: tuple[dict[str, Any], ...]

    @property
    def size_bytes(self) -> int:
        return sum(int(file["size_bytes"]) for file in self.files)


def claim_job(
    session: Session,
    pool: str,
    *,
    worker_name: str,
    lease_seconds: float,
    is_idle: bool = False,
    slot_seconds: float = SLOT_SECONDS,
    prepare: Callable[[Job], None] = lambda _job: None,
) -> Job | None:
    """Claim the fairest job of a pool, or None. The job's `lease_token` is the fence of everything that follows.

    `slot_seconds` bounds the entry charge: the GPU-seconds that a slot of the worker uses in a quantum.

    A worker that `is_idle`, holding no job, takes one that must be tried alone first. One that is not may be given
    such a job too (its `suspect_step` is set) once it has waited long, and must give back the others before it starts.
    A job that cannot be claimed, or that `prepare` cannot read, stays queued and is set aside; the next is claimed.
    """
    for _ in range(_MAX_CLAIM_TRIES):
        picked = _pick_job(session, pool, worker_name=worker_name, is_idle=is_idle)
        if picked is None:
            return None
        with setting_aside(session, Duty.CLAIM, row_id=picked.job_id, tenant_id=picked.tenant_id) as claim:
            job = _take_job(session, picked.job_id, tenant_id=picked.tenant_id, lease_seconds=lease_seconds)
            if job is not None:
                _begin_attempt(session, job, worker_name, slot_seconds=slot_seconds)
                prepare(job)
        if claim.is_done:
            return job
    return None


def _pick_job(session: Session, pool: str, *, worker_name: str, is_idle: bool) -> Any:
    """Return the job to claim, with its tenant, or None. The tenant's row is locked."""
    patience = 0.0 if is_idle else SUSPECT_PATIENCE_SECONDS
    suspects = {"pool": pool, "patience": patience, "is_idle": is_idle, "worker": worker_name}
    suspect = session.execute(_PICK_SUSPECT, suspects).one_or_none()
    return suspect or session.execute(_PICK, {"pool": pool}).one_or_none()


def heartbeat(session: Session, lease: Lease, *, lease_seconds: float) -> bool:
    """Prolong a lease by the database's clock, and return whether its job is to pause."""
    held = session.execute(
        update(Job)
        .where(*_held(lease))
        .values(lease_until=func.now() + timedelta(seconds=lease_seconds))
        .returning(Job.pause_requested_at)
    ).one_or_none()
    if held is None:
        raise StaleLeaseError("The lease is not held any more.")
    return held.pause_requested_at is not None


def record_step(session: Session, lease: Lease, *, record: StepRecord, total_steps: int) -> None:
    """Store one step's metrics and show them as an event. A step that is stored already stays as it is."""
    job = _pass_step(session, lease, record.step)
    if job is None:
        return
    numbers = record.__dict__
    session.add(Observation(job_id=job.id, tenant_id=job.tenant_id, lease_token=lease.token, **numbers))
    record_event(
        session,
        job,
        message=f"Step {record.step}/{total_steps}: training loss={record.train_loss:.4f}",
        metrics={
            "step": record.step,
            "total_steps": total_steps,
            "train_loss": record.train_loss,
            "train_mean_token_accuracy": record.train_accuracy,
            "learning_rate": record.learning_rate,
            "num_tokens": record.num_tokens,
        },
    )


def record_skipped_step(session: Session, lease: Lease, *, step: int, total_steps: int) -> None:
    """Count a step that has changed nothing, and say so in an event. A step that is counted already is not again."""
    job = _pass_step(session, lease, step)
    if job is None:
        return
    job.skipped_steps += 1
    record_event(
        session,
        job,
        level="warn",
        message=f"Step {step}/{total_steps} was skipped: its gradient was not finite.",
        metrics={"step": step, "total_steps": total_steps, "is_skipped": True},
    )


def record_datasets(session: Session, lease: Lease, *, datasets: Mapping[DatasetName, DatasetCounts | None]) -> None:
    """Store what became of the job's rows, and warn of what is not trained on; of what was warned of before, not again.

    Every attempt reads the same files, and finds the same.
    """
    job = lock_held(session, lease)
    before = job.datasets or {}
    job.datasets = {name: counts.model_dump() if counts else None for name, counts in datasets.items()}
    for name, counts in datasets.items():
        loss = describe_loss(counts, file=name, max_seq_len=job.spec["max_seq_len"]) if counts else None
        if loss is not None and job.datasets[name] != before.get(name):
            record_event(session, job, level="warn", message=loss)


def record_evaluation(session: Session, lease: Lease, *, step: int, loss: float, accuracy: float) -> None:
    """Store the validation result that belongs to a step."""
    job = lock_held(session, lease)
    session.execute(
        update(Observation)
        .where(Observation.job_id == job.id, Observation.step == step)
        .values(valid_loss=loss, valid_accuracy=accuracy)
    )
    metrics = {"step": step, "full_valid_loss": loss, "full_valid_mean_token_accuracy": accuracy}
    record_event(session, job, message=f"Step {step}: validation loss={loss:.4f}", metrics=metrics)


def record_message(session: Session, lease: Lease, *, message: str, level: str) -> None:
    record_event(session, lock_held(session, lease), message=message, level="warn" if level == "warn" else "info")


def record_checkpoint(
    session: Session, lease: Lease, *, step: int, artifact: StoredArtifact, metrics: dict[str, Any]
) -> tuple[str, ...]:
    """Publish a checkpoint whose objects are stored and verified, and return the object prefixes that no row names.

    What is published stays: the checkpoint of a step that an earlier attempt has shown already is not shown again.
    """
    job = lock_held(session, lease)
    shown = select(Checkpoint.object_prefix).where(Checkpoint.job_id == job.id, Checkpoint.step == step)
    if prefix := session.scalar(shown):
        return () if prefix == artifact.object_prefix else (artifact.object_prefix,)
    session.add(
        Checkpoint(
            id=new_id(),
            tenant_id=job.tenant_id,
            job_id=job.id,
            lease_token=lease.token,
            step=step,
            model_name=checkpoint_model_name(_model_name(session, job), step),
            object_prefix=artifact.object_prefix,
            files=list(artifact.files),
            size_bytes=artifact.size_bytes,
            metrics=metrics,
        )
    )
    record_event(session, job, message=f"Checkpoint created at step {step}.")
    return ()


def succeed_attempt(
    session: Session, lease: Lease, *, adapter: StoredArtifact, result_file: NewFile, trained_tokens: int
) -> None:
    """Publish the adapter and end the job: the one guarded UPDATE that makes the result real."""
    job = lock_held(session, lease)
    name = _model_name(session, job)
    result = create_file(session, job.tenant_id, new=result_file)
    session.add(
        Adapter(
            id=new_id(),
            tenant_id=job.tenant_id,
            job_id=job.id,
            name=name,
            base_model_id=job.base_model_id,
            object_prefix=adapter.object_prefix,
            files=list(adapter.files),
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
    session: Session,
    lease: Lease,
    *,
    code: str,
    message: str,
    is_job_fault: bool,
    is_suspect: bool = False,
    param: str | None = None,
) -> None:
    """End an attempt that failed. The job's own fault is final; ours is another attempt, until there are too many.

    `param` is the field of the submission that names the file at fault, if one is. A job that `is_suspect`, because its
    trainer died with it alone, is tried alone next.
    """
    job = lock_held(session, lease)
    if is_suspect:
        job.suspect_step = job.trained_steps
    error = {"code": code, "message": message, "param": param}
    _end_attempt(session, lease, outcome=AttemptOutcome.FAILED, error=error)
    _retry_or_fail(session, job, lease, error=error, is_final=is_job_fault)


def requeue_attempt(session: Session, lease: Lease) -> None:
    """Give a job back before its end: paused if that was asked, else queued again. The attempt does not count."""
    job = lock_held(session, lease)
    if job.pause_requested_at is not None:
        job.attempt_count -= 1  # as often as its tenant asks for it
        _end_attempt(session, lease, outcome=AttemptOutcome.PAUSED)
        _leave_running(session, lease, status=JobStatus.PAUSED, run_after=func.now())
        record_event(session, job, message="The job is paused.")
        return
    is_lent = is_lending(session, lease.token)
    _end_attempt(session, lease, outcome=AttemptOutcome.LENT if is_lent else AttemptOutcome.PREEMPTED)
    if not _take_back_count(job):
        _retry_or_fail(session, job, lease, error=_NO_PROGRESS, is_final=False)
        return
    _leave_running(session, lease, status=JobStatus.QUEUED, run_after=func.now())
    reason = "Other organizations have their turn" if is_lent else "The worker gives the job back"
    record_event(session, job, message=f"{reason}; it is queued again.")
    announce_work(session, job.pool)


def postpone_attempt(session: Session, lease: Lease, *, code: str, message: str, param: str | None = None) -> None:
    """End an attempt that a server's absence has ended: it does not count, and the job is tried again soon."""
    job = lock_held(session, lease)
    _take_back_count(job)
    error = {"code": code, "message": message, "param": param}
    _end_attempt(session, lease, outcome=AttemptOutcome.FAILED, error=error)
    _retry_or_fail(session, job, lease, error=error, is_final=False)


def suspect_attempt(session: Session, lease: Lease, *, code: str, message: str) -> None:
    """End an attempt whose trainer died with several jobs in it: not charged, and tried alone next."""
    job = lock_held(session, lease)
    job.suspect_step = job.trained_steps
    job.num_suspicions += 1
    error = {"code": code, "message": message, "param": None}
    _end_attempt(session, lease, outcome=AttemptOutcome.FAILED, error=error)
    if not _take_back_count(job):
        _retry_or_fail(session, job, lease, error=error, is_final=False)
        return
    status = JobStatus.QUEUED if job.pause_requested_at is None else JobStatus.PAUSED
    _leave_running(session, lease, status=status, run_after=func.now())
    told = f"{message} Several jobs were in it; this attempt does not count, and the job is tried alone next."
    record_event(session, job, level="warn", message=told)
    announce_work(session, job.pool)


def acquit_job(session: Session, lease: Lease) -> bool:
    """Let a job train beside others again, and return whether another of its pool waits to be tried alone."""
    job = lock_held(session, lease)
    job.suspect_step = None
    waiting = select(Job.id).where(
        Job.pool == job.pool, Job.status == JobStatus.QUEUED, Job.suspect_step.is_not(None), Job.run_after <= func.now()
    )
    return session.scalar(waiting.limit(1)) is not None


def forgive_loss(session: Session, lease: Lease) -> bool:
    """Take back the count of an attempt that was ended as lost, and return whether there was anything to take back.

    Its worker lives and says so itself. It was cut off from the database, or stood still: it did not die of the job.
    """
    job = session.scalar(select(Job).where(Job.id == lease.job_id).with_for_update())
    if job is None or job.status in TERMINAL_STATUSES:
        return False
    is_lost = (Attempt.lease_token == lease.token, Attempt.error["code"].astext == _WORKER_LOST["code"])
    attempt = session.scalar(select(Attempt).where(*is_lost))
    if attempt is None or not _take_back_count(job):
        return False
    attempt.error = _CUT_OFF
    record_event(session, job, message="Its worker had only lost touch; that attempt does not count.")
    return True


def expire_leases(session: Session, *, limit: int = 100) -> int:
    """Queue again, or fail, the jobs whose workers have not been heard of within their leases; return how many."""
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


def _expire_lease(session: Session, job: Job) -> None:
    assert job.lease_token is not None
    lease = Lease(job_id=job.id, tenant_id=job.tenant_id, token=job.lease_token)
    _end_attempt(session, lease, outcome=AttemptOutcome.LOST, error=_WORKER_LOST)
    _retry_or_fail(session, job, lease, error=_WORKER_LOST, is_final=False)


def record_departure(session: Session, lease: Lease, *, seconds_ago: float) -> None:
    """Say when the device was rid of an attempt, whether or not it has ended. What was said first stays."""
    session.execute(
        update(Attempt)
        .where(Attempt.lease_token == lease.token, Attempt.left_device_at.is_(None))
        .values(left_device_at=func.now() - timedelta(seconds=seconds_ago))
    )


def claimable_pools(session: Session) -> Sequence[str]:
    """Return the pools that have at least one job to claim now."""
    return session.scalars(_CLAIMABLE_POOLS).all()


def lock_held(session: Session, lease: Lease) -> Job:
    """Return the lease's job, locked until the transaction ends. Raises StaleLeaseError.

    What ends under this lock ends at `clock_timestamp()`: `now()` is when the transaction began, which may be before
    the last rows that others wrote until they gave the lock up.
    """
    job = session.scalar(select(Job).where(*_held(lease)).with_for_update())
    if job is None:
        raise StaleLeaseError("The lease is not held any more.")
    return job


def _pass_step(session: Session, lease: Lease, step: int) -> Job | None:
    """Move the job to a step that is over. None where it is there, or beyond, already."""
    job = lock_held(session, lease)
    if step <= job.trained_steps:
        return None
    job.trained_steps = step
    if step > job.furthest_step:
        job.furthest_step, job.num_uncounted = step, 0
    return job


def _take_job(session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID, lease_seconds: float) -> Job | None:
    """Give a queued job a lease, unless its tenant's quota is full by now.

    A second statement sees what committed before the tenant's row was locked, so the quota is counted exactly.
    """
    max_running = select(Tenant.max_running).where(Tenant.id == tenant_id).scalar_subquery()
    num_running = (
        select(func.count())
        .select_from(Job)
        .where(Job.tenant_id == tenant_id, Job.status == JobStatus.RUNNING)
        .correlate(None)
        .scalar_subquery()
    )
    taken: Job | None = session.scalar(
        update(Job)
        .where(Job.id == job_id, Job.status == JobStatus.QUEUED, num_running < max_running)
        .values(
            status=JobStatus.RUNNING,
            attempt_count=Job.attempt_count + 1,
            lease_token=LEASE_TOKENS.next_value(),
            lease_until=func.now() + timedelta(seconds=lease_seconds),
            started_at=func.coalesce(Job.started_at, func.now()),
        )
        .returning(Job)
        .execution_options(synchronize_session=False)
    )
    return taken


def _begin_attempt(session: Session, job: Job, worker_name: str, *, slot_seconds: float) -> None:
    num_steps = job.total_steps - job.trained_steps
    attempt = Attempt(
        id=new_id(),
        tenant_id=job.tenant_id,
        job_id=job.id,
        number=job.attempt_count,
        lease_token=job.lease_token,
        worker_name=worker_name,
        entry_charge_seconds=estimate_charge(job.id, pool=job.pool, num_steps=num_steps, max_seconds=slot_seconds),
    )
    session.add(attempt)
    session.flush()
    charge_tenant(session, job.tenant_id, attempt.entry_charge_seconds)
    record_event(session, job, message=f"Attempt {job.attempt_count} has started.")


def _held(lease: Lease) -> tuple[Any, ...]:
    return (Job.id == lease.job_id, Job.lease_token == lease.token, Job.status == JobStatus.RUNNING)


def _leave_running(session: Session, lease: Lease, **values: Any) -> None:
    left = session.scalar(
        update(Job)
        .where(*_held(lease))
        .values(lease_token=None, lease_until=None, pause_requested_at=None, **values)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    if left is None:
        raise StaleLeaseError("The lease is not held any more.")


def _end_attempt(
    session: Session, lease: Lease, *, outcome: AttemptOutcome, error: dict[str, Any] | None = None
) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.lease_token == lease.token)
        .values(outcome=outcome, error=error, ended_at=func.clock_timestamp())
    )


def _take_back_count(job: Job) -> bool:
    """Do not count the attempt that ends, unless too many in a row have ended so without a new step; return whether."""
    if job.num_uncounted >= MAX_UNCOUNTED:
        return False
    job.num_uncounted += 1
    job.attempt_count -= 1
    return True


def _retry_or_fail(session: Session, job: Job, lease: Lease, *, error: dict[str, Any], is_final: bool) -> None:
    if is_final or job.attempt_count >= job.max_attempts:
        _leave_running(session, lease, status=JobStatus.FAILED, error=error, finished_at=func.clock_timestamp())
        record_event(session, job, level="error", message=f"The job has failed: {error['message']}")
        return
    delay = timedelta(seconds=retry_delay_seconds(job.attempt_count, num_uncounted=job.num_uncounted))
    if job.pause_requested_at is not None:
        _leave_running(session, lease, status=JobStatus.PAUSED, run_after=func.now() + delay)
        record_event(session, job, level="warn", message=f"{error['message']} The job is paused.")
        return
    _leave_running(session, lease, status=JobStatus.QUEUED, run_after=func.now() + delay)
    record_event(session, job, level="warn", message=f"{error['message']} It is queued again.")
    announce_work(session, job.pool)


def _model_name(session: Session, job: Job) -> str:
    slug = session.scalars(select(Tenant.slug).where(Tenant.id == job.tenant_id)).one()
    return fine_tuned_model_name(job.base_model_id, tenant_slug=slug, suffix=job.suffix, digits=job.name_digits)
