"""/v1/fine_tuning/jobs: submit, list, cancel, pause, resume and delete jobs."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Header, Query, Request, Response

from api.dependencies import Caller, Now, RowChecks, Transaction, needs
from api.document import describe_refusal
from api.parameters import After, JobId, page_limit
from api.routers import TenantRouter
from api.routing import PrerequisiteError
from api.schemas.openai.checkpoints import CheckpointObject
from api.schemas.openai.events import EventObject
from api.schemas.openai.job_requests import CreateJob
from api.schemas.openai.jobs import JobObject
from api.schemas.openai.lists import DeletedObject, ListObject, as_list
from core.domain.api_keys import Scope
from core.domain.ids import IdKind, format_id, parse_id
from core.services import adapters, events, idempotency, jobs
from core.services.progress import estimate_jobs
from core.services.submissions import UncheckedRowsError

router = TenantRouter("/v1/fine_tuning/jobs", tag="fine-tuning")
Limit = Annotated[int, page_limit(100)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="A word of your choice: requests that have it in common submit one job.",
    ),
]
_KEY_REUSED: dict[int | str, dict[str, Any]] = {422: describe_refusal("The Idempotency-Key stands for another request")}
RetryCount = Annotated[
    int,
    Header(
        ge=0, le=1_000_000, description="How often OpenAI's client has tried before. A retry submits no second job."
    ),
]


@router.post("", summary="Submit a job", dependencies=[needs(Scope.SUBMIT)], responses=_KEY_REUSED)
def create_job(
    response: Response,
    session: Transaction,
    caller: Caller,
    rows: RowChecks,
    body: CreateJob,
    idempotency_key: IdempotencyKey = None,
    x_stainless_retry_count: RetryCount = 0,
) -> JobObject:
    """Submit a fine-tuning job, once for all tries of one submission."""
    try:
        submission = idempotency.submit_once(
            session,
            caller.tenant_id,
            request=body.to_request(),
            idempotency_key=idempotency_key,
            is_retry=x_stainless_retry_count > 0,
            is_checked=rows.knows,
        )
    except UncheckedRowsError as unchecked:
        raise PrerequisiteError(partial(rows.check, unchecked.rows), limiter=rows.limiter) from unchecked
    if submission.is_replayed:
        response.headers["idempotent-replayed"] = "true"
    return JobObject.of(submission.job)


@router.get("", summary="List jobs", dependencies=[needs(Scope.READ)])
def list_jobs(
    request: Request,
    session: Transaction,
    caller: Caller,
    now: Now,
    limit: Limit = 20,
    after: After = None,
    metadata: Annotated[
        Literal["null"] | None, Query(description="`null` keeps the jobs without any metadata.")
    ] = None,
) -> ListObject[JobObject]:
    """List jobs, newest first. `metadata[key]=value` keeps the jobs that have all the pairs."""
    cursor = None if after is None else parse_id(IdKind.JOB, after, param="after")
    pairs = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    wanted = pairs or ({} if metadata else None)
    page = jobs.list_jobs(session, caller.tenant_id, after=cursor, limit=limit, metadata=wanted)
    estimates = estimate_jobs(session, caller.tenant_id, jobs=page.items, now=now)
    return as_list(page, lambda row: JobObject.of(row, estimate=estimates.get(row.id)))


@router.get("/{job_id}", summary="Get a job", dependencies=[needs(Scope.READ)])
def get_job(session: Transaction, caller: Caller, now: Now, job_id: JobId) -> JobObject:
    """Return a job: its terms, its status and its progress."""
    job = jobs.get_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id))
    return JobObject.of(job, estimate=estimate_jobs(session, caller.tenant_id, jobs=[job], now=now).get(job.id))


@router.post("/{job_id}/cancel", summary="Cancel a job", dependencies=[needs(Scope.SUBMIT)])
def cancel_job(session: Transaction, caller: Caller, job_id: JobId) -> JobObject:
    """End a job before it is done. It keeps the checkpoints that it has."""
    return JobObject.of(jobs.cancel_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id)))


@router.post("/{job_id}/pause", summary="Pause a job", dependencies=[needs(Scope.SUBMIT)])
def pause_job(session: Transaction, caller: Caller, job_id: JobId) -> JobObject:
    """Stop a job so that it can be resumed. A running job first stores where it stands."""
    return JobObject.of(jobs.pause_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id)))


@router.post("/{job_id}/resume", summary="Resume a job", dependencies=[needs(Scope.SUBMIT)])
def resume_job(session: Transaction, caller: Caller, job_id: JobId) -> JobObject:
    """Queue a paused job again, at its old place. It continues from where it was paused."""
    return JobObject.of(jobs.resume_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id)))


@router.delete("/{job_id}", summary="Delete a job", dependencies=[needs(Scope.SUBMIT)])
def delete_job(session: Transaction, caller: Caller, job_id: JobId) -> DeletedObject:
    """Delete a job that has ended, with its model, its checkpoints, its result file and its history."""
    deleted = parse_id(IdKind.JOB, job_id)
    jobs.delete_job(session, caller.tenant_id, job_id=deleted)
    return DeletedObject(id=format_id(IdKind.JOB, deleted), object="fine_tuning.job")


@router.get("/{job_id}/events", summary="List a job's events", dependencies=[needs(Scope.READ)])
def list_events(
    session: Transaction, caller: Caller, job_id: JobId, limit: Limit = 20, after: After = None
) -> ListObject[EventObject]:
    """List the events of a job, newest first."""
    job = jobs.get_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id))
    cursor = None if after is None else parse_id(IdKind.EVENT, after, param="after")
    page = events.list_events(session, caller.tenant_id, job_id=job.id, after=cursor, limit=limit)
    return as_list(page, EventObject.of)


@router.get("/{job_id}/checkpoints", summary="List a job's checkpoints", dependencies=[needs(Scope.READ)])
def list_checkpoints(
    session: Transaction, caller: Caller, job_id: JobId, limit: Limit = 10, after: After = None
) -> ListObject[CheckpointObject]:
    """List the checkpoints of a job, newest first."""
    job = jobs.get_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id))
    cursor = None if after is None else parse_id(IdKind.CHECKPOINT, after, param="after")
    page = adapters.list_checkpoints(session, caller.tenant_id, job_id=job.id, after=cursor, limit=limit)
    return as_list(page, CheckpointObject.of)
