"""Progress of running jobs, measured on their own steps: one statement for however many jobs are shown."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import select, true
from sqlalchemy.orm import Session

from core.db.models import Job, Metric
from core.domain.jobs import JobStatus
from core.domain.progress import MEASURED_STEPS, Estimate, estimate_finish, measure_steps


def estimate_jobs(
    session: Session, tenant_id: uuid.UUID, *, jobs: Sequence[Job], now: dt.datetime
) -> Mapping[uuid.UUID, Estimate]:
    """Return an estimate for those of a tenant's jobs that run and have done two steps in this attempt."""
    running = {job.id: job for job in jobs if job.status == JobStatus.RUNNING and job.trained_steps}
    estimates = {}
    for job_id, instants in _last_steps(session, tenant_id, list(running)).items():
        job, times = running[job_id], measure_steps(instants)
        if times is not None:
            remaining = max(0, job.total_steps - job.trained_steps)
            estimates[job_id] = estimate_finish(times, remaining_steps=remaining, last_step_at=instants[-1], now=now)
    return estimates


def _last_steps(
    session: Session, tenant_id: uuid.UUID, job_ids: list[uuid.UUID]
) -> Mapping[uuid.UUID, list[dt.datetime]]:
    """Return when each job's last steps under its present lease were recorded, in order."""
    instants: dict[uuid.UUID, list[dt.datetime]] = defaultdict(list)
    if not job_ids:
        return instants
    last = (
        select(Metric.step, Metric.created_at)
        .where(Metric.tenant_id == tenant_id, Metric.job_id == Job.id, Metric.lease_token == Job.lease_token)
        .order_by(Metric.step.desc())
        .limit(MEASURED_STEPS)
        .lateral("last")
    )
    query = (
        select(Job.id, last.c.created_at)
        .join(last, true())
        .where(Job.tenant_id == tenant_id, Job.id.in_(job_ids))
        .order_by(Job.id, last.c.step)
    )
    for job_id, recorded_at in session.execute(query).tuples():
        instants[job_id].append(recorded_at)
    return instants
