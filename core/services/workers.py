"""The workers alive. Each upserts a row about itself, which counts until the time `alive_until` in that row."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import any_, delete, func, literal, select
from sqlalchemy.dialects.postgresql import insert

from core.db.models import Worker
from core.db.session import OperatorSession, OwnerSession, ServiceSession
from core.domain.workers import WorkerFacts

# A killed worker leaves its row, and no later worker takes up its identity. Such rows are shown for this long.
_SHOWN_AFTER_DEATH = timedelta(days=1)


def record_worker(session: ServiceSession, facts: WorkerFacts, *, alive_seconds: float, is_start: bool) -> None:
    """Record that a worker is alive for the next `alive_seconds`, by the database's clock."""
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


def list_refusals(session: OperatorSession) -> tuple[Refusal, ...]:
    """Return the bases that live workers cannot load. For operators."""
    query = select(Worker.name, Worker.refusals).where(Worker.alive_until > func.now()).order_by(Worker.name)
    return tuple(
        Refusal(name, pool, reason)
        for name, refusals in session.execute(query)
        for pool, reason in sorted(refusals.items())
    )


def is_served(session: OwnerSession, pool: str) -> bool:
    """Say whether a live worker may serve a pool."""
    alive = select(Worker.name).where(Worker.alive_until > func.now(), literal(pool) == any_(Worker.pools))
    return session.scalar(alive.limit(1)) is not None


def forget_worker(session: ServiceSession, name: str) -> None:
    """Delete the row of one worker, by its identity."""
    session.execute(delete(Worker).where(Worker.name == name))
