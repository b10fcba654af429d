"""When this worker shares what it has: its base, turn by turn, with its other pools, and its slots with other tenants.

The decisions are the database's (core.services.turns). This module knows how long the base has been held, and asks no
more often than it must: with one pool there is nothing to decide about bases, and with a free slot nothing to lend.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from sqlalchemy import Engine

from core.db.session import service_transaction
from core.domain.scheduling import slot_seconds, turn_length
from core.services import turns
from core.services.turns import PoolChoice, SlotTerms
from core.settings import WorkerSettings

_LOOK_SECONDS = 2.0


class TurnKeeper:
    """Knows how long the base has been held. The thread that serves calls it; any may read `pool_seconds`."""

    def __init__(self, settings: WorkerSettings, *, engine: Engine) -> None:
        self._settings = settings
        self._engine = engine
        self._held_since = time.monotonic()
        self._turn_seconds = 0.0
        self._looked_at = 0.0

    @property
    def pool_seconds(self) -> float:
        """How long the base has been held."""
        return time.monotonic() - self._held_since

    @property
    def is_over(self) -> bool:
        """Whether another pool may have its turn."""
        return len(self._settings.worker_pools) > 1 and self.pool_seconds >= self._turn_seconds

    def is_due(self) -> bool:
        """Say whether it is time to look who waits, and count that as a look."""
        is_due = time.monotonic() - self._looked_at >= _LOOK_SECONDS
        if is_due:
            self._looked_at = time.monotonic()
        return is_due

    def begin(self, pool: str, *, load_seconds: float) -> None:
        """Begin the turn of a pool whose base took so long to load."""
        self._held_since = time.monotonic()
        self._turn_seconds = turn_length(self._settings.turn_seconds, load_seconds=load_seconds)
        with service_transaction(self._engine) as session:
            turns.record_load(session, pool, seconds=load_seconds)

    def choose_pool(self, pool: str | None) -> str | None:
        """Return the pool that a worker without jobs serves next, or None where no pool has work for it."""
        with service_transaction(self._engine) as session:
            return turns.choose_pool(session, self._choice(pool))

    def end(self, pool: str, *, holders: Sequence[uuid.UUID], held: Sequence[int]) -> str | None:
        """Return the pool whose turn comes now: this one's is over, and the job that is next is that one's. Else None.

        The attempts `held`, by their lease tokens, are noted as giving their slots to others.
        """
        if not self.is_over:
            return None
        choice = self._choice(pool, holders)
        with service_transaction(self._engine) as session:
            fairest = turns.find_fairest_job(session, choice)
        if fairest is None or fairest.pool == pool or fairest.is_behind:
            return None
        with service_transaction(self._engine) as session:
            next_pool = turns.choose_pool(session, choice)
            if next_pool in (None, pool):
                return None
            turns.mark_lending(session, held)
        return next_pool

    def lend(self, pool: str, *, held: Sequence[int], slots: int, wanting: int | None) -> int | None:
        """Return the lease token of a slot to lend now, or None. `wanting` is a held job that lacks memory."""
        quantum = self._settings.quantum_seconds
        terms = SlotTerms(quantum, slot_seconds(quantum, slots=slots))
        with service_transaction(self._engine) as session:
            return turns.lend_slot(
                session, pool, worker_name=self._settings.worker_name, held=held, terms=terms, wanting=wanting
            )

    def _choice(self, pool: str | None, holders: Sequence[uuid.UUID] = ()) -> PoolChoice:
        return PoolChoice(
            worker_name=self._settings.worker_name,
            pools=self._settings.worker_pools,
            pool=pool,
            keeps_pool=not self.is_over,
            holders=tuple(holders),
        )
