"""Progress of running jobs, measured from their own steps. One statement serves any number of jobs."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import select, true

from core.db.models import Job, Observation
from core.db.session import TenantSession
from core.domain.jobs import JobStatus
from core.domain.progress import MEASURED_STEPS, Estimate, StepMark, estimate_finish, measure_steps


def estimate_jobs(
    session: TenantSession, tenant_id: uuid.UUID, *, jobs: Sequence[Job], now: dt.datetime
) -> Mapping[uuid.UUID, Estimate]:
    """Return an estimate for those of a tenant's jobs that keep running and have done two steps in this attempt."""
    running = {job.id: job for job in jobs if job.status == JobStatus.RUNNING and job.pause_requested_at is None}
    estimates = {}
    for job_id, marks in _last_steps(session, tenant_id, list(running)).items():
        times = measure_steps(marks)
        if times is not None:
            remaining = max(0, running[job_id].total_steps - marks[-1].step)
            estimates[job_id] = estimate_finish(times, remaining_steps=remaining, last_step_at=marks[-1].at, now=now)
    return estimates


def _last_steps(
    session: TenantSession, tenant_id: uuid.UUID, job_ids: list[uuid.UUID]
) -> Mapping[uuid.UUID, list[StepMark]]:
    """Return when each job's last steps under its present lease were recorded, in order."""
    marks: dict[uuid.UUID, list[StepMark]] = defaultdict(list)
    if not job_ids:
        return marks
    # For each job the lateral query reads the primary key (job_id, step) backwards, and stops after MEASURED_STEPS
    # rows.
    last = (
        select(Observation.step, Observation.created_at)
        .where(
            Observation.tenant_id == tenant_id, Observation.job_id == Job.id, Observation.lease_token == Job.lease_token
        )
        .order_by(Observation.step.desc())
        .limit(MEASURED_STEPS)
        .lateral("last")
    )
    query = (
        select(Job.id, last.c.step, last.c.created_at)
        .join(last, true())
        .where(Job.tenant_id == tenant_id, Job.id.in_(job_ids))
        .order_by(Job.id, last.c.step)
    )
    for job_id, step, recorded_at in session.execute(query):
        marks[job_id].append(StepMark(step, recorded_at))
    return marks
