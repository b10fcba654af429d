"""`espalier jobs`: jobs of all tenants, without their texts."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Annotated, Any

import typer

from api.schemas.oversight import JobOverviewObject
from cli.output import as_duration, is_json, print_rows
from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from cli.paging import After, Limit, say_more
from cli.pool_names import PoolNames
from cli.tables import Column
from core.domain.errors import InvalidRequestError, NotFoundError
from core.domain.ids import IdKind, parse_id
from core.domain.jobs import JobStatus
from core.services import oversight
from core.services.oversight import JobFilter, JobOverview

JOB_COLUMNS = (
    *(Column("id", is_whole=True), "tenant", "pool", "status", Column("steps", is_whole=True)),
    *(Column("age", leaves_at=2), Column("worker", leaves_at=1)),
)


def jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only those of this status.")] = None,
    pool: Annotated[str | None, typer.Option(help="Only those of this pool.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant, by its slug.")] = None,
    limit: Limit = 50,
    after: After = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Show everybody's jobs, newest first."""
    cursor = _parse_cursor(after) if after else None
    with operator_session(data_dir) as session:
        names = PoolNames(oversight.list_pool_names(session))
        wanted = JobFilter(status=status, pool=names.find(pool) if pool else None, tenant=tenant)
        page = oversight.list_job_overviews(session, wanted, after=cursor, limit=limit)
    now = dt.datetime.now(dt.UTC)
    rows = [JobOverviewObject.of(each).model_dump() for each in page.items]
    cells = rows if is_json() else [job_cells(each, now, names) for each in page.items]
    print_rows(JOB_COLUMNS, cells)
    say_more(has_more=page.has_more, last=rows[-1]["id"] if rows else "")


def _parse_cursor(after: str) -> uuid.UUID:
    try:
        return parse_id(IdKind.JOB, after, param="after")
    except NotFoundError as error:
        reason = f"--after takes the id of a job, such as {IdKind.JOB}{'0' * 32}: {after[:100]!r} is none."
        raise InvalidRequestError(reason, param="after") from error


def job_cells(job: JobOverview, now: dt.datetime, names: PoolNames) -> dict[str, Any]:
    """Return the cells of a job in a table. Its age counts from its submission to its end."""
    return {
        "id": f"{IdKind.JOB}{job.id.hex}",
        "tenant": job.tenant,
        "pool": names.shorten(job.pool),
        "status": _job_status(job),
        "steps": f"{job.trained_steps}/{job.total_steps}",
        "age": as_duration(((job.finished_at or now) - job.created_at).total_seconds()),
        "worker": job.worker_name,
    }


def _job_status(job: JobOverview) -> str:
    if job.pause_requested_at is not None:
        return f"{job.status}, pausing"
    return f"{job.status} {job.error_code}" if job.error_code else job.status
