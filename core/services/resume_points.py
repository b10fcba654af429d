"""Resume points: stored slot states from which a job's next attempt resumes, on any worker.

A row is published under the fence, after its objects are stored. The newest two points are kept, so that a damaged one
has another behind it. When an attempt starts from a point, all points of later steps are deleted.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, func, select, update

from core.db.models import Attempt, Job, Observation, ResumePoint
from core.db.session import ServiceSession
from core.domain.ids import new_id
from core.domain.leases import Lease
from core.domain.values import StoredArtifact
from core.services.events import record_event
from core.services.leases import lock_held

KEPT_RESUME_POINTS = 2


def list_resume_points(session: ServiceSession, lease: Lease) -> Sequence[ResumePoint]:
    """Return the job's resume points, newest first."""
    query = select(ResumePoint).where(ResumePoint.job_id == lease.job_id)
    return session.scalars(query.order_by(ResumePoint.step.desc(), ResumePoint.lease_token.desc())).all()


def record_resume_point(
    session: ServiceSession, lease: Lease, *, step: int, artifact: StoredArtifact
) -> tuple[str, ...]:
    """Publish a stored slot state once. Return the object prefixes that the job no longer needs."""
    job = lock_held(session, lease)
    points = list_resume_points(session, lease)
    if any((point.lease_token, point.step) == (lease.token, step) for point in points):
        return ()
    session.add(
        ResumePoint(
            id=new_id(),
            tenant_id=job.tenant_id,
            job_id=job.id,
            lease_token=lease.token,
            step=step,
            object_prefix=artifact.object_prefix,
            files=artifact.dump_files(),
            size_bytes=artifact.size_bytes,
        )
    )
    spent = points[KEPT_RESUME_POINTS - 1 :]
    for point in spent:
        session.delete(point)
    return tuple(point.object_prefix for point in spent)


def begin_steps(session: ServiceSession, lease: Lease, *, step: int, total_steps: int) -> tuple[str, ...]:
    """Record that an attempt trains from now on, after `step` (0 is the start). Numbers of later steps are deleted.

    `total_steps` replaces the estimate of the submission. Published checkpoints stay. Returns the object prefixes of
    the deleted resume points.
    """
    job = lock_held(session, lease)
    job.trained_steps, job.total_steps = step, total_steps
    job.skipped_steps = step - _count_observations(session, job, until=step)
    session.execute(update(Attempt).where(Attempt.lease_token == lease.token).values(stepping_at=func.now()))
    session.execute(delete(Observation).where(Observation.job_id == job.id, Observation.step > step))
    lost = session.scalars(
        delete(ResumePoint)
        .where(ResumePoint.job_id == job.id, ResumePoint.step > step)
        .returning(ResumePoint.object_prefix)
    ).all()
    if step:
        record_event(session, job, message=f"Resumed from step {step}.")
    return tuple(lost)


def _count_observations(session: ServiceSession, job: Job, *, until: int) -> int:
    """Return how many steps up to `until` have numbers. A skipped step has none.

    The reports of all steps before a resume point are stored before the point itself, so none is missing.
    """
    counted = (
        select(func.count()).select_from(Observation).where(Observation.job_id == job.id, Observation.step <= until)
    )
    return session.scalars(counted).one()


def forget_resume_points(session: ServiceSession, lease: Lease) -> tuple[str, ...]:
    """Delete the resume points of an ended job. Return their object prefixes."""
    dropped = delete(ResumePoint).where(ResumePoint.job_id == lease.job_id).returning(ResumePoint.object_prefix)
    return tuple(session.scalars(dropped).all())
