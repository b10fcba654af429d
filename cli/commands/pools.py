"""`espalier pools`: what waits and runs in each pool, and which workers serve it."""

from __future__ import annotations

from typing import Any

from api.schemas.oversight import PoolObject
from cli.output import as_duration, is_json, print_rows
from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from cli.paging import After, Limit, say_more
from cli.pool_names import PoolNames
from cli.tables import Column
from core.services import oversight
from core.services.oversight import PoolOverview

POOL_COLUMNS = (
    *("pool", "base", "queued", Column("oldest", leaves_at=3), "running"),
    *(Column("slots", leaves_at=1), Column("wanted", leaves_at=2), "workers"),
)


def pools(limit: Limit = 100, after: After = None, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show the pools: what waits and since when, what runs, how many workers that would fill, and who serves them."""
    with operator_session(data_dir) as session:
        names = PoolNames(oversight.list_pool_names(session))
        page = oversight.list_pool_overviews(session, after=after, limit=limit)
    rows = [PoolObject.of(each).model_dump() if is_json() else pool_cells(each, names) for each in page.items]
    print_rows(POOL_COLUMNS, rows)
    say_more(has_more=page.has_more, last=page.items[-1].demand.pool if page.items else "")


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
