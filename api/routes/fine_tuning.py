"""/v1/fine_tuning/jobs: submit, look, cancel."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from api.dependencies import Caller, Database, Now, Transaction, needs
from api.schemas.objects import CheckpointObject, EventObject, JobObject, ListObject, as_list
from api.schemas.requests import CreateJob
from core.db.session import tenant_transaction
from core.domain.api_keys import Scope
from core.domain.ids import IdKind, parse_id
from core.services import adapters, events, jobs

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("", dependencies=[needs(Scope.SUBMIT)])
def create_job(database: Database, caller: Caller, now: Now, body: CreateJob) -> JobObject:
    """Submit a job. The transaction ends here: others may wait for its lock in every thread that there is."""
    with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
        job = jobs.submit_job(session, caller.tenant_id, request=body.to_request())
    return JobObject.of(job, now=now)


@router.get("", dependencies=[needs(Scope.READ)])
def list_jobs(
    request: Request, session: Transaction, caller: Caller, now: Now, limit: Limit = 20, after: str | None = None
) -> ListObject[JobObject]:
    cursor = parse_id(IdKind.JOB, after, param="after") if after else None
    wanted = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    page = jobs.list_jobs(session, caller.tenant_id, after=cursor, limit=limit, metadata=wanted)
    return as_list(page, lambda row: JobObject.of(row, now=now))


@router.get("/{job_id}", dependencies=[needs(Scope.READ)])
def get_job(session: Transaction, caller: Caller, now: Now, job_id: str) -> JobObject:
    return JobObject.of(jobs.get_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id)), now=now)


@router.post("/{job_id}/cancel", dependencies=[needs(Scope.SUBMIT)])
def cancel_job(session: Transaction, caller: Caller, now: Now, job_id: str) -> JobObject:
    return JobObject.of(jobs.cancel_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id)), now=now)


@router.get("/{job_id}/events", dependencies=[needs(Scope.READ)])
def list_events(
    session: Transaction, caller: Caller, job_id: str, limit: Limit = 20, after: str | None = None
) -> ListObject[EventObject]:
    job = jobs.get_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id))
    cursor = parse_id(IdKind.EVENT, after, param="after") if after else None
    page = events.list_events(session, caller.tenant_id, job_id=job.id, after=cursor, limit=limit)
    return as_list(page, EventObject.of)


@router.get("/{job_id}/checkpoints", dependencies=[needs(Scope.READ)])
def list_checkpoints(
    session: Transaction, caller: Caller, job_id: str, limit: Limit = 10, after: str | None = None
) -> ListObject[CheckpointObject]:
    job = jobs.get_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id))
    cursor = parse_id(IdKind.CHECKPOINT, after, param="after") if after else None
    page = adapters.list_checkpoints(session, caller.tenant_id, job_id=job.id, after=cursor, limit=limit)
    return as_list(page, CheckpointObject.of)
