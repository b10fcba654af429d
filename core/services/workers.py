"""The workers that are alive: each upserts a row about itself, which counts until a time that the row itself names."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from sqlalchemy import delete, func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.db.models import Worker

WorkerState = Literal["idle", "loading", "serving", "stopping"]


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself. `pool` is the one whose base it holds or loads, with that base's slots.

    It has held that base for `pool_seconds`, and is about to load that of `next_pool`.
    """

    name: str
    pools: tuple[str, ...]
    state: WorkerState
    pool: str | None = None
    slots: int = 0
    slots_in_use: int = 0
    pool_seconds: float = 0.0
    next_pool: str | None = None


def record_worker(session: Session, facts: WorkerFacts, *, alive_seconds: float, is_start: bool) -> None:
    """Say that a worker is alive, for the next `alive_seconds` by the database's clock."""
    values = {
        "name": facts.name,
        "pools": list(facts.pools),
        "state": facts.state,
        "pool": facts.pool,
        "slots": facts.slots,
        "slots_in_use": facts.slots_in_use,
        "pool_since": func.now() - timedelta(seconds=facts.pool_seconds) if facts.pool else None,
        "next_pool": facts.next_pool,
        "heartbeat_at": func.now(),
        "alive_until": func.now() + timedelta(seconds=alive_seconds),
    }
    if is_start:
        values["started_at"] = func.now()
    session.execute(insert(Worker).values(values).on_conflict_do_update(index_elements=["name"], set_=values))


def forget_worker(session: Session, name: str) -> None:
    session.execute(delete(Worker).where(Worker.name == name))
