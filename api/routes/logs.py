"""/v1/fine_tuning/jobs/{id}/logs: what the workers did for a job, line by line, oldest first."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query

from api.admission import LISTINGS
from api.dependencies import Caller, Transaction, needs
from api.parameters import After, JobId, page_limit
from api.routers import TenantRouter
from api.schemas.observations import LogLineObject
from api.schemas.openai.lists import ListObject, as_list
from core.domain.api_keys import Scope
from core.domain.ids import IdKind, parse_id
from core.services import jobs
from core.services.logs import LogFilter, list_log_lines

router = TenantRouter("/v1/fine_tuning/jobs", tag="fine-tuning")


@router.get("/{job_id}/logs", summary="List a job's log lines", dependencies=[needs(Scope.READ), Depends(LISTINGS)])
def list_logs(
    session: Transaction,
    caller: Caller,
    job_id: JobId,
    attempt: Annotated[int | None, Query(ge=1, le=1000, description="Show the lines of this attempt only.")] = None,
    limit: Annotated[int, page_limit(1000)] = 100,
    after: After = None,
) -> ListObject[LogLineObject]:
    """List what the workers did for a job, oldest first."""
    job = jobs.get_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id))
    cursor = None if after is None else parse_id(IdKind.LOG_LINE, after, param="after")
    wanted = LogFilter(attempt, cursor, limit)
    return as_list(list_log_lines(session, caller.tenant_id, job_id=job.id, wanted=wanted), LogLineObject.of)
