"""`espalier workers`: the workers, and what each holds."""

from __future__ import annotations

from typing import Any

from api.schemas.oversight import WorkerObject
from cli.output import as_duration, is_json, print_rows, say
from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from cli.paging import After, Limit, say_more
from cli.pool_names import PoolNames
from cli.tables import Column
from core.services import oversight
from core.services.oversight import WorkerOverview

WORKER_COLUMNS = (
    *(Column("name", is_whole=True), "state", "base", Column("slots", is_whole=True), "beat"),
    *(Column("up", leaves_at=2), Column("version", leaves_at=3), Column("serves", leaves_at=1)),
)


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
    say_more(has_more=page.has_more, last=page.items[-1].name if page.items else "")


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
