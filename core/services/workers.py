"""The workers that are alive: each upserts a row about itself, which counts until a time that the row itself names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from sqlalchemy import any_, delete, func, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.db.models import Worker

# A worker that is killed leaves its row, and nobody takes up its identity again.
_SHOWN_AFTER_DEATH = timedelta(days=1)
WorkerState = Literal["idle", "loading", "serving", "stopping"]


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself. `pool` is the one whose base it holds or loads, with that base's slots.

    `name` is its identity, `given_name` what it is called. Its clock is `clock_offset_seconds` ahead of the database's,
    and it claims nothing where that is too much.
    It has held that base for `pool_seconds`, and is about to load that of `next_pool`. `refusals` says, by pool, why it
    cannot load the bases of others, in words for operators.
    """

    name: str
    pools: tuple[str, ...]
    state: WorkerState
    pool: str | None = None
    slots: int = 0
    slots_in_use: int = 0
    pool_seconds: float = 0.0
    next_pool: str | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None
    given_name: str | None = None
    clock_offset_seconds: float | None = None
    is_clock_wrong: bool = False


def record_worker(session: Session, facts: WorkerFacts, *, alive_seconds: float, is_start: bool) -> None:
    """Say that a worker is alive, for the next `alive_seconds` by the database's clock."""
    values = {
        "name": facts.name,
        "given_name": facts.given_name,
        "pools": list(facts.pools),
        "state": facts.state,
        "pool": facts.pool,
        "slots": facts.slots,
        "slots_in_use": facts.slots_in_use,
        "pool_since": func.now() - timedelta(seconds=facts.pool_seconds) if facts.pool else None,
        "next_pool": facts.next_pool,
        "refusals": dict(facts.refusals),
        "version": facts.version,
        "clock_offset_seconds": facts.clock_offset_seconds,
        "is_clock_wrong": facts.is_clock_wrong,
        "heartbeat_at": func.now(),
        "alive_until": func.now() + timedelta(seconds=alive_seconds),
    }
    if is_start:
        values["started_at"] = func.now()
        session.execute(delete(Worker).where(Worker.alive_until < func.now() - _SHOWN_AFTER_DEATH))
    session.execute(insert(Worker).values(values).on_conflict_do_update(index_elements=["name"], set_=values))


@dataclass(frozen=True)
class Refusal:
    """Why a worker cannot load the base of one of its pools, in words for operators."""

    worker: str
    pool: str
    reason: str


def list_refusals(session: Session) -> tuple[Refusal, ...]:
    """Return what the workers alive cannot load. For operators."""
    query = select(Worker.name, Worker.refusals).where(Worker.alive_until > func.now()).order_by(Worker.name)
    return tuple(
        Refusal(name, pool, reason)
        for name, refusals in session.execute(query)
        for pool, reason in sorted(refusals.items())
    )


def is_served(session: Session, pool: str) -> bool:
    """Say whether a worker is alive that may serve a pool."""
    alive = select(Worker.name).where(Worker.alive_until > func.now(), literal(pool) == any_(Worker.pools))
    return session.scalar(alive.limit(1)) is not None


def forget_worker(session: Session, name: str) -> None:
    """Take away the row of one worker, by its identity."""
    session.execute(delete(Worker).where(Worker.name == name))
