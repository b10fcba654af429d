"""/admin, what operators look at: everybody's jobs, the workers, the pools and their demand, and what was used.

No answer holds what is a tenant's own: no file, no row, no name that a tenant has chosen but its slug.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Response

from api.dependencies import Now, OperatorGate, OperatorTransaction
from api.routing import OneThreadRoute
from api.schemas.openai.jobs import ListObject, as_list
from api.schemas.oversight import (
    Day,
    JobOverviewObject,
    PoolDemandObject,
    PoolObject,
    UsageObject,
    WorkerObject,
    usage_csv,
)
from core.domain.ids import IdKind, parse_id
from core.domain.jobs import JobStatus
from core.services import oversight, usage
from core.services.oversight import JobFilter
from core.services.usage import UsageGroup, UsagePeriod

router = APIRouter(prefix="/admin", tags=["admin"], route_class=OneThreadRoute, dependencies=[Depends(OperatorGate())])
Limit = Annotated[int, Query(ge=1, le=1000)]
_CSV = "text/csv"
_JSON_OR_CSV: dict[int | str, dict[str, Any]] = {200: {"content": {_CSV: {"schema": {"type": "string"}}}}}


@router.get("/jobs")
def list_jobs(
    session: OperatorTransaction,
    limit: Limit = 100,
    after: str | None = None,
    status: JobStatus | None = None,
    pool: str | None = None,
    tenant: str | None = None,
) -> ListObject[JobOverviewObject]:
    """List everybody's jobs, newest first; of one tenant by its slug. The cursor is a job's id."""
    cursor = None if after is None else parse_id(IdKind.JOB, after, param="after")
    wanted = JobFilter(status=status, pool=pool, tenant=tenant)
    return as_list(oversight.list_job_overviews(session, wanted, after=cursor, limit=limit), JobOverviewObject.of)


@router.get("/workers")
def list_workers(
    session: OperatorTransaction, limit: Limit = 100, after: str | None = None
) -> ListObject[WorkerObject]:
    """List the workers by identity: those alive, and those that have ended without saying so. The cursor is one."""
    return as_list(oversight.list_worker_overviews(session, after=after, limit=limit), WorkerObject.of)


@router.get("/pools")
def list_pools(session: OperatorTransaction, limit: Limit = 100, after: str | None = None) -> ListObject[PoolObject]:
    """List the pools by name: what waits, what runs, who serves it. The cursor is a name."""
    return as_list(oversight.list_pool_overviews(session, after=after, limit=limit), PoolObject.of)


@router.get("/pools/{pool:path}/demand")
def get_pool_demand(session: OperatorTransaction, pool: str) -> PoolDemandObject:
    """Say how many workers the jobs of a pool would fill: `workers_wanted` is what to scale by."""
    return PoolDemandObject.of(oversight.find_pool_demand(session, pool))


@router.get("/usage", response_model=ListObject[UsageObject], responses=_JSON_OR_CSV)
def sum_usage(
    session: OperatorTransaction,
    now: Now,
    first: Annotated[Day | None, Query(alias="from", description="The first day; of the month by default.")] = None,
    last: Annotated[Day | None, Query(alias="to", description="The last day, included; today by default.")] = None,
    group_by: UsageGroup = UsageGroup.TENANT,
    format: Literal["json", "csv"] | None = None,  # noqa: A002 (the name on the wire)
    limit: Limit = 1000,
    after: str | None = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> ListObject[UsageObject] | Response:
    """Sum GPU-seconds, tokens and jobs of attempts that have ended, by tenant, pool or day (UTC), as JSON or CSV.

    CSV is asked for by `format=csv` or `Accept: text/csv`; the header `X-Has-More` says whether more follows.
    """
    period = UsagePeriod.of(first, last, now=now)
    page = usage.sum_usage(session, period, group=group_by, after=after, limit=limit)
    if format == "csv" or (format is None and _CSV in accept):
        told = {"X-Has-More": str(page.has_more).lower()}
        return Response(usage_csv(group_by, page.items), media_type=_CSV, headers=told)
    return as_list(page, lambda total: UsageObject.of(total, group_by))
