"""The answer of `explain`: state, reason, place, share, workers and an honest interval."""

from __future__ import annotations

from pydantic import BaseModel

from core.domain.ids import IdKind, format_id
from core.domain.outlook import PoolQueue, PoolWorkers, WaitCode
from core.domain.progress import measure_progress
from core.services.explanations import Eta, Explanation


class ReasonObject(BaseModel):
    code: WaitCode
    message: str


class PlaceObject(BaseModel):
    """`position` 1 is the next job that the pool starts; `num_waiting` counts all tenants' jobs."""

    position: int
    num_waiting: int

    @classmethod
    def of(cls, queue: PoolQueue) -> PlaceObject:
        return cls(position=queue.num_ahead + 1, num_waiting=queue.num_waiting)


class ShareObject(BaseModel):
    """`now` is the part of the pool's recent use that was the organization's, `entitled` what its weight gives it."""

    now: float
    entitled: float
    num_running: int
    max_running: int


class WorkersObject(BaseModel):
    """As the workers said at their last heartbeat, at most a few heartbeats ago."""

    num_alive: int
    num_serving: int
    num_loading: int
    slots: int
    slots_in_use: int
    last_seen_at: int | None

    @classmethod
    def of(cls, workers: PoolWorkers) -> WorkersObject:
        return cls(
            num_alive=workers.num_alive,
            num_serving=workers.num_serving,
            num_loading=workers.num_loading,
            slots=workers.slots,
            slots_in_use=workers.slots_in_use,
            last_seen_at=int(workers.last_seen_at.timestamp()) if workers.last_seen_at else None,
        )


class EtaObject(BaseModel):
    """The job may end between `earliest` and `latest`.

    `basis` is "measured_steps" (of this job) or "recent_jobs" (of the pool, any tenant's, the last 7 days);
    `num_measured` says of how many.
    """

    earliest: int
    latest: int
    basis: str
    num_measured: int

    @classmethod
    def of(cls, eta: Eta) -> EtaObject:
        earliest, latest = (int(at.timestamp()) for at in (eta.interval.earliest, eta.interval.latest))
        return cls(earliest=earliest, latest=latest, basis=eta.basis, num_measured=eta.num_measured)


class ExplanationObject(BaseModel):
    object: str = "fine_tuning.job.explanation"
    job_id: str
    status: str
    reason: ReasonObject | None
    place: PlaceObject | None
    share: ShareObject | None
    workers: WorkersObject | None
    progress: float
    eta: EtaObject | None

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
