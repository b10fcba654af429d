"""Leases in the database: hold, prolong and check them. A lease is the fence of every write of an attempt.

Only the newest attempt of a running job may change the job, its events, its observations and its artifacts.
StaleLeaseError means that the attempt is over and must stop at once.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import ColumnElement, func, select, update

from core.db.models import Job
from core.db.session import ServiceSession
from core.domain.jobs import JobStatus
from core.domain.leases import Lease, StaleLeaseError


def lock_held(session: ServiceSession, lease: Lease) -> Job:
    """Return the lease's job, locked until the transaction ends. Raises StaleLeaseError.

    An end under this lock uses `clock_timestamp()`. `now()` is the begin of the transaction, which may be before the
    last rows that others wrote while they held the lock.
    """
    job = session.scalar(select(Job).where(*is_held(lease)).with_for_update())
    if job is None:
        raise StaleLeaseError("The lease is not held any more.")
    return job


def heartbeat(session: ServiceSession, lease: Lease, *, lease_seconds: float) -> bool:
    """Prolong a lease by the database's clock. Return whether its job is to pause."""
    held = session.execute(
        update(Job)
        .where(*is_held(lease))
        .values(lease_until=func.now() + timedelta(seconds=lease_seconds))
        .returning(Job.pause_requested_at)
    ).one_or_none()
    if held is None:
        raise StaleLeaseError("The lease is not held any more.")
    return held.pause_requested_at is not None


def is_held(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that a job runs under this lease."""
    return (Job.id == lease.job_id, Job.lease_token == lease.token, Job.status == JobStatus.RUNNING)
