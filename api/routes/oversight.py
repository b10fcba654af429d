"""/admin, what operators look at: the jobs of all tenants, workers, pools and their demand, and usage.

No answer holds a tenant's own data: no file, no row, and no name that a tenant has chosen but its slug.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Header, Query, Response

from api.dependencies import Now, OperatorTransaction
from api.parameters import After, OfTenant, PoolName, page_limit
from api.routers import OperatorRouter
from api.schemas.openai.lists import ListObject, as_list
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

router = OperatorRouter("/admin", tag="admin")
Limit = Annotated[int, page_limit(1000)]
_CSV = "text/csv"
_JSON_OR_CSV: dict[int | str, dict[str, Any]] = {200: {"content": {_CSV: {"schema": {"type": "string"}}}}}


@router.get("/jobs", summary="List jobs of all tenants")
def list_jobs(
    session: OperatorTransaction,
    limit: Limit = 100,
    after: After = None,
    status: Annotated[JobStatus | None, Query(description="Show jobs of this status only.")] = None,
    pool: Annotated[str | None, Query(description="Show jobs of this pool only.")] = None,
    tenant: OfTenant = None,
) -> ListObject[JobOverviewObject]:
    """List everybody's jobs, newest first. The cursor is a job's id."""
    cursor = None if after is None else parse_id(IdKind.JOB, after, param="after")
    wanted = JobFilter(status=status, pool=pool, tenant=tenant)
    return as_list(oversight.list_job_overviews(session, wanted, after=cursor, limit=limit), JobOverviewObject.of)


@router.get("/workers", summary="List workers")
def list_workers(session: OperatorTransaction, limit: Limit = 100, after: After = None) -> ListObject[WorkerObject]:
    """List the workers by identity: those alive, and those that ended without saying so. The cursor is an identity."""
    return as_list(oversight.list_worker_overviews(session, after=after, limit=limit), WorkerObject.of)


@router.get("/pools", summary="List pools")
def list_pools(session: OperatorTransaction, limit: Limit = 100, after: After = None) -> ListObject[PoolObject]:
    """List the pools by name: what waits in them, what runs, and who serves them. The cursor is a name."""
    return as_list(oversight.list_pool_overviews(session, after=after, limit=limit), PoolObject.of)


@router.get("/pools/{pool:path}/demand", summary="Get a pool's demand")
def get_pool_demand(session: OperatorTransaction, pool: PoolName) -> PoolDemandObject:
    """Say how many workers the jobs of a pool would fill. `workers_wanted` is the number to scale to."""
    return PoolDemandObject.of(oversight.find_pool_demand(session, pool))


@router.get(
    "/usage",
    summary="Sum usage",
    response_model=ListObject[UsageObject],
    responses=_JSON_OR_CSV,
    response_description="One page of sums, as JSON or CSV.",
)
def sum_usage(
    session: OperatorTransaction,
    now: Now,
    first: Annotated[Day | None, Query(alias="from", description="The first day; of the month by default.")] = None,
    last: Annotated[Day | None, Query(alias="to", description="The last day, included; today by default.")] = None,
    group_by: Annotated[UsageGroup, Query(description="What to sum by.")] = UsageGroup.TENANT,
    format: Annotated[  # noqa: A002 (the name on the wire)
        Literal["json", "csv"] | None,
        Query(description="How to answer: `json` or `csv`. Absent for what the header `Accept` asks for."),
    ] = None,
    limit: Limit = 1000,
    after: After = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> ListObject[UsageObject] | Response:
    """Sum GPU-seconds, tokens and jobs of attempts that have ended, by tenant, pool or day (UTC), as JSON or CSV.

    `format=csv` or `Accept: text/csv` asks for CSV. Its header `X-Has-More` says whether more follows.
    """
    period = UsagePeriod.of(first, last, now=now)
    page = usage.sum_usage(session, period, group=group_by, after=after, limit=limit)
    if format == "csv" or (format is None and _CSV in accept):
        told = {"X-Has-More": str(page.has_more).lower()}
        return Response(usage_csv(group_by, page.items), media_type=_CSV, headers=told)
    return as_list(page, lambda total: UsageObject.of(total, group_by))
