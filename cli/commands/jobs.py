"""`espalier jobs`, `workers`, `pools` and `usage`: what goes on, over all tenants, and never a tenant's words."""

from __future__ import annotations

import datetime as dt
import sys
import uuid
from typing import Annotated, Any

import typer

from api.schemas.oversight import JobOverviewObject, PoolObject, UsageObject, WorkerObject, usage_csv
from cli.output import as_duration, is_json, print_rows, say
from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from cli.pool_names import PoolNames
from cli.tables import Column
from core.domain.errors import InvalidRequestError, NotFoundError
from core.domain.ids import IdKind, parse_id
from core.domain.jobs import JobStatus
from core.services import oversight
from core.services import usage as use
from core.services.oversight import JobFilter, JobOverview, PoolOverview, WorkerOverview
from core.services.usage import UsageGroup, UsagePeriod

Limit = Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")]
After = Annotated[str | None, typer.Option(help="Go on behind this one, the last of the page before.")]
_DAY = ["%Y-%m-%d"]
_PAGE_ROWS = 1000
JOB_COLUMNS = (
    *(Column("id", is_whole=True), "tenant", "pool", "status", Column("steps", is_whole=True)),
    *(Column("age", leaves_at=2), Column("worker", leaves_at=1)),
)
WORKER_COLUMNS = (
    *(Column("name", is_whole=True), "state", "base", Column("slots", is_whole=True), "beat"),
    *(Column("up", leaves_at=2), Column("version", leaves_at=3), Column("serves", leaves_at=1)),
)
POOL_COLUMNS = (
    *("pool", "base", "queued", Column("oldest", leaves_at=3), "running"),
    *(Column("slots", leaves_at=1), Column("wanted", leaves_at=2), "workers"),
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
    _say_more(has_more=page.has_more, last=rows[-1]["id"] if rows else "")


def workers(limit: Limit = 100, after: After = None, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show the workers: what they hold, how many slots are in use, when they were last heard of."""
    with operator_session(data_dir) as session:
        names = PoolNames(oversight.list_pool_names(session))
        page = oversight.list_worker_overviews(session, after=after, limit=limit)
    rows = [WorkerObject.of(each).model_dump() if is_json() else worker_cells(each, names) for each in page.items]
    print_rows(WORKER_COLUMNS, rows)
    if not is_json():
        for each in page.items:
            for pool, reason in sorted(each.refusals.items()):
                say(f"Worker {each.name} cannot load {pool}: {reason}")
    _say_more(has_more=page.has_more, last=page.items[-1].name if page.items else "")


def pools(limit: Limit = 100, after: After = None, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show the pools: what waits and since when, what runs, how many workers that would fill, and who serves them."""
    with operator_session(data_dir) as session:
        names = PoolNames(oversight.list_pool_names(session))
        page = oversight.list_pool_overviews(session, after=after, limit=limit)
    rows = [PoolObject.of(each).model_dump() if is_json() else pool_cells(each, names) for each in page.items]
    print_rows(POOL_COLUMNS, rows)
    _say_more(has_more=page.has_more, last=page.items[-1].demand.pool if page.items else "")


def usage(
    first: Annotated[
        dt.datetime | None, typer.Option("--from", formats=_DAY, help="The first day; of the month by default.")
    ] = None,
    last: Annotated[
        dt.datetime | None, typer.Option("--to", formats=_DAY, help="The last day, included; today by default.")
    ] = None,
    group_by: Annotated[UsageGroup, typer.Option(help="What is summed up.")] = UsageGroup.TENANT,
    limit: Annotated[
        int | None, typer.Option(min=1, max=_PAGE_ROWS, help="At most so many: 1000 by default, and all with --csv.")
    ] = None,
    after: After = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Sum GPU-seconds, tokens and jobs of attempts that have ended, by tenant, pool or day (UTC)."""
    days = [each.date() if each else None for each in (first, last)]
    period = UsagePeriod.of(days[0], days[1], now=dt.datetime.now(dt.UTC))
    with operator_session(data_dir) as session:
        page = use.sum_usage(session, period, group=group_by, after=after, limit=limit or _PAGE_ROWS)
        totals = list(page.items)
        while as_csv and limit is None and page.has_more:
            page = use.sum_usage(session, period, group=group_by, after=totals[-1].label, limit=_PAGE_ROWS)
            totals += page.items
    if as_csv and not is_json():
        sys.stdout.write(usage_csv(group_by, totals))
        if page.has_more:
            sys.stderr.write(f"There are more: --after {totals[-1].label}\n")
        return
    columns = (Column("id", group_by), "gpu_seconds", "trained_tokens", Column("num_jobs", "jobs"))
    rows = [UsageObject.of(each, group_by).model_dump() for each in totals]
    print_rows((*columns, Column("num_attempts", "attempts")), rows)
    _say_more(has_more=page.has_more, last=totals[-1].label if totals else "")


def _parse_cursor(after: str) -> uuid.UUID:
    try:
        return parse_id(IdKind.JOB, after, param="after")
    except NotFoundError as error:
        reason = f"--after takes the id of a job, such as {IdKind.JOB}{'0' * 32}: {after[:100]!r} is none."
        raise InvalidRequestError(reason, param="after") from error


def job_cells(job: JobOverview, now: dt.datetime, names: PoolNames) -> dict[str, Any]:
    """Return a job as a table shows it. Its age is counted from its submission to its end."""
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


def worker_cells(worker: WorkerOverview, names: PoolNames) -> dict[str, Any]:
    base = names.shorten(worker.pool) if worker.pool else "-"
    held_for = (worker.heartbeat_at - worker.started_at).total_seconds()
    return {
        "name": worker.name,
        "state": _worker_state(worker),
        "base": f"{base} -> {names.shorten(worker.next_pool)}" if worker.next_pool else base,
        "slots": f"{worker.slots_in_use}/{worker.slots}",
        "beat": f"{as_duration(worker.silent_seconds)} ago",
        "up": as_duration(held_for),
        "version": worker.version,
        "serves": len(worker.pools),
    }


def _worker_state(worker: WorkerOverview) -> str:
    if not worker.is_alive:
        return "gone"
    offset = f" {worker.clock_offset_seconds:+.0f} s" if worker.is_clock_wrong else ""
    return worker.shown_state + offset


def pool_cells(pool: PoolOverview, names: PoolNames) -> dict[str, Any]:
    demand = pool.demand
    return {
        "pool": names.shorten(demand.pool),
        "base": pool.base_state if pool.is_offered else f"{pool.base_state}, not offered",
        "queued": f"{pool.num_queued} ({demand.num_claimable} now)" if pool.num_queued else 0,
        "oldest": as_duration(pool.oldest_seconds),
        "running": demand.num_running,
        "slots": demand.num_slots,
        "wanted": demand.workers_wanted,
        "workers": f"{pool.num_workers} ({pool.num_holding} hold it)" if pool.num_workers else 0,
    }


def _say_more(*, has_more: bool, last: str) -> None:
    if has_more and not is_json():
        say(f"There are more: --after {last}")
