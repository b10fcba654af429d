"""`espalier usage`: usage by tenant, pool or day."""

from __future__ import annotations

import datetime as dt
import sys
from typing import Annotated

import typer

from api.schemas.oversight import UsageObject, usage_csv
from cli.output import is_json, print_rows
from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from cli.paging import After, say_more
from cli.tables import Column
from core.services import usage as use
from core.services.usage import UsageGroup, UsagePeriod

_DAY = ["%Y-%m-%d"]
_PAGE_ROWS = 1000


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
    say_more(has_more=page.has_more, last=totals[-1].label if totals else "")
