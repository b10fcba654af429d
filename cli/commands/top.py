"""`espalier top`: pools, workers and running jobs, live. In a pipe it prints one frame."""

from __future__ import annotations

import datetime as dt
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text
from sqlalchemy import Engine

from api.schemas.oversight import JobOverviewObject, PoolObject, WorkerObject
from cli.commands.jobs import JOB_COLUMNS, job_cells
from cli.commands.pools import POOL_COLUMNS, pool_cells
from cli.commands.workers import WORKER_COLUMNS, worker_cells
from cli.output import find_width, is_json, make_table, print_json
from cli.owner import DEFAULT_DATA_DIR, DataDir, actor, owner_engine
from cli.pool_names import PoolNames
from core.db.session import DATABASE_ERRORS, operator_transaction
from core.domain.jobs import JobStatus
from core.services.oversight import (
    JobFilter,
    JobOverview,
    PoolOverview,
    WorkerOverview,
    list_job_overviews,
    list_pool_names,
    list_pool_overviews,
    list_worker_overviews,
)

_MAX_ROWS = 200


@dataclass(frozen=True)
class Frame:
    """The state at one instant: the pools, the workers, and the running jobs, newest first."""

    at: dt.datetime
    pools: tuple[PoolOverview, ...]
    workers: tuple[WorkerOverview, ...]
    jobs: tuple[JobOverview, ...]
    pool_names: PoolNames


def top(
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 2.0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Watch pools, workers and running jobs until Ctrl-C. In a pipe, or as JSON, show them once."""
    with owner_engine(data_dir) as engine:
        frame = read_frame(engine)
        if is_json():
            print_json(_as_document(frame))
        elif sys.stdout.isatty():
            _watch(engine, frame, interval)
        else:
            Console(width=find_width(), emoji=False).print(draw(frame))


def read_frame(engine: Engine) -> Frame:
    with operator_transaction(engine, actor=actor()) as session:
        pools = list_pool_overviews(session, limit=_MAX_ROWS).items
        workers = list_worker_overviews(session, limit=_MAX_ROWS).items
        running = list_job_overviews(session, JobFilter(status=JobStatus.RUNNING), limit=_MAX_ROWS).items
        names = PoolNames(list_pool_names(session))
    return Frame(dt.datetime.now(dt.UTC), pools, workers, running, names)


def draw(frame: Frame, *, trouble: str = "") -> RenderableType:
    """Return a frame for the screen. Jobs come last, because lines beyond the screen's edge are lost."""
    alive = [each for each in frame.workers if each.is_alive]
    counts = (
        f"{sum(each.num_queued for each in frame.pools)} queued, "
        f"{sum(each.demand.num_running for each in frame.pools)} running, {len(alive)} workers alive, "
        f"{sum(each.slots_in_use for each in alive)} of {sum(each.slots for each in alive)} slots in use"
    )
    parts: list[RenderableType] = [Text(f"espalier  {frame.at:%Y-%m-%d %H:%M:%S} UTC   {counts}", style="bold")]
    if trouble:
        parts.append(Text(trouble, style="red"))
    names = frame.pool_names
    parts += [Text(), make_table(POOL_COLUMNS, [pool_cells(each, names) for each in frame.pools])]
    parts += [Text(), make_table(WORKER_COLUMNS, [worker_cells(each, names) for each in frame.workers])]
    parts += [Text(), make_table(JOB_COLUMNS, [job_cells(each, frame.at, names) for each in frame.jobs])]
    return Group(*parts)


def _watch(engine: Engine, frame: Frame, interval: float) -> None:
    """Show frame after frame. While the database is away, show that and ask again."""
    with Live(draw(frame), screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                try:
                    frame = read_frame(engine)
                    live.update(draw(frame), refresh=True)
                except DATABASE_ERRORS as error:
                    trouble = f"The database does not answer ({type(error).__name__}); what follows is old."
                    live.update(draw(frame, trouble=trouble), refresh=True)
        except KeyboardInterrupt:
            return


def _as_document(frame: Frame) -> dict[str, object]:
    return {
        "at": frame.at,
        "pools": [PoolObject.of(each).model_dump(mode="json") for each in frame.pools],
        "workers": [WorkerObject.of(each).model_dump(mode="json") for each in frame.workers],
        "jobs": [JobOverviewObject.of(each).model_dump(mode="json") for each in frame.jobs],
    }
