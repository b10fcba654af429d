"""The answer of `explain`: why a job waits, its place, its share, the workers, and when it may end."""

from __future__ import annotations

from typing import Literal

from api.schemas.wire import Answer, optional_seconds, unix_seconds
from core.domain.ids import IdKind, format_id
from core.domain.jobs import JobStatus
from core.domain.outlook import PoolQueue, PoolWorkers, WaitCode
from core.domain.progress import measure_progress
from core.services.explanations import Eta, Explanation


class ReasonObject(Answer):
    """The one thing that must change first."""

    code: WaitCode
    """The reason, a stable word for programs."""
    message: str
    """The reason, for people."""


class PlaceObject(Answer):
    """The job's place in the queue of its pool."""

    position: int
    """The job's place in the fair order. 1 is the next job that the pool starts."""
    num_waiting: int
    """The number of jobs that wait in the pool, of all organizations."""

    @classmethod
    def of(cls, queue: PoolQueue) -> PlaceObject:
        return cls(position=queue.num_ahead + 1, num_waiting=queue.num_waiting)


class ShareObject(Answer):
    """The organization's share of the pool."""

    now: float
    """The part of the pool's recent use that was the organization's, from 0 to 1."""
    entitled: float
    """The part that the organization's weight gives it, from 0 to 1."""
    num_running: int
    """The number of the organization's jobs that run, in all pools."""
    max_running: int
    """The number of its jobs that may run at a time."""


class WorkersObject(Answer):
    """The workers that may serve the job's pool, as they said at their last heartbeat."""

    num_alive: int
    """The workers that are alive and can load the base."""
    num_serving: int
    """The workers among them that hold the base."""
    num_loading: int
    """The workers among them that load the base."""
    slots: int
    """The jobs that the serving workers can train at a time."""
    slots_in_use: int
    """The jobs that they train now."""
    last_seen_at: int | None
    """The newest heartbeat of any worker of the pool, alive or not, in Unix seconds. Null if there was none."""

    @classmethod
    def of(cls, workers: PoolWorkers) -> WorkersObject:
        return cls(
            num_alive=workers.num_alive,
            num_serving=workers.num_serving,
            num_loading=workers.num_loading,
            slots=workers.slots,
            slots_in_use=workers.slots_in_use,
            last_seen_at=optional_seconds(workers.last_seen_at),
        )


class EtaObject(Answer):
    """The times between which the job may end."""

    earliest: int
    """The earliest time, in Unix seconds."""
    latest: int
    """The latest time, in Unix seconds."""
    basis: Literal["measured_steps", "recent_jobs"]
    """What was measured.

    - `measured_steps`: Steps of this job.
    - `recent_jobs`: Jobs of the pool in the last 7 days, of any organization.
    """
    num_measured: int
    """The number of steps or jobs that were measured."""

    @classmethod
    def of(cls, eta: Eta) -> EtaObject:
        earliest, latest = unix_seconds(eta.interval.earliest), unix_seconds(eta.interval.latest)
        return cls(earliest=earliest, latest=latest, basis=eta.basis, num_measured=eta.num_measured)


class ExplanationObject(Answer):
    """Why a job waits, and when it may end."""

    object: Literal["fine_tuning.job.explanation"] = "fine_tuning.job.explanation"
    """The kind of this object."""
    job_id: str
    """The job's id."""
    status: JobStatus
    """Where the job is in its life."""
    reason: ReasonObject | None
    """Why the job waits. Null if it does not."""
    place: PlaceObject | None
    """The job's place in the queue. Null if it is in none."""
    share: ShareObject | None
    """The organization's share of the pool. Null if the job has ended."""
    workers: WorkersObject | None
    """The workers of the pool. Null if the job has ended."""
    progress: float
    """How much of the job is done, from 0 to 1."""
    eta: EtaObject | None
    """When the job may end. Null if no measurement tells."""

    @classmethod
    def of(cls, explained: Explanation) -> ExplanationObject:
        job, queue, reason = explained.job, explained.queue, explained.reason
        return cls(
            job_id=format_id(IdKind.JOB, job.id),
            status=job.status,
            reason=ReasonObject(code=reason.code, message=reason.sentence) if reason else None,
            place=PlaceObject.of(queue) if queue and reason and reason.code != WaitCode.PAUSED else None,
            share=_share(explained) if queue else None,
            workers=WorkersObject.of(explained.workers) if explained.workers else None,
            progress=measure_progress(job.status, trained_steps=job.trained_steps, total_steps=job.total_steps),
            eta=EtaObject.of(explained.eta) if explained.eta else None,
        )


def _share(explained: Explanation) -> ShareObject:
    assert explained.queue is not None
    return ShareObject(
        now=explained.queue.share_now,
        entitled=explained.queue.share_entitled,
        num_running=explained.tenant.num_running,
        max_running=explained.tenant.max_running,
    )
