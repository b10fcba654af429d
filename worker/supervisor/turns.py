"""When this worker shares what it has: its base, turn by turn, with its other pools, and its slots with other tenants.

The decisions are the database's (core.services.turns). This module knows how long the base has been held, and asks no
more often than it must: with one pool there is nothing to decide about bases, and with a free slot nothing to lend.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Engine

from core.db.session import service_transaction
from core.domain.scheduling import slot_seconds
from core.services import turns
from core.services.turns import Loan, PoolChoice, SlotTerms
from core.settings import WorkerSettings
from worker.supervisor.bases import BaseHolder

_LOOK_SECONDS = 2.0


class TurnKeeper:
    """Asks whose turn it is. The thread that serves calls it."""

    def __init__(self, settings: WorkerSettings, *, name: str, engine: Engine, base: BaseHolder) -> None:
        self._settings, self._name = settings, name
        self._engine = engine
        self._base = base
        self._looked_at = 0.0

    @property
    def is_over(self) -> bool:
        """Whether another pool may have its turn."""
        length = self._settings.fairness_terms.turn_length(self._base.load_seconds)
        return len(self._settings.worker_pools) > 1 and self._base.held_seconds >= length

    def is_due(self) -> bool:
        """Say whether it is time to look who waits, and count that as a look."""
        is_due = time.monotonic() - self._looked_at >= _LOOK_SECONDS
        if is_due:
            self._looked_at = time.monotonic()
        return is_due

    def choose_pool(self, pools: Sequence[str], *, promised: str | None) -> str | None:
        """Return which of these pools a worker without jobs serves next, or None where none has work for it.

        A pool whose turn was `promised` comes first. The jobs that left for it wait too, and may be older.
        """
        choice = self._choice(pools)
        if promised is not None:
            choice = replace(choice, pool=promised, keeps_pool=True)
        with service_transaction(self._engine) as session:
            return turns.choose_pool(session, choice)

    def end(self, pools: Sequence[str], *, holders: Sequence[uuid.UUID], held: Sequence[int]) -> str | None:
        """Return which of these pools has its turn now, or None while the job that is next is that of the held base.

        The attempts `held`, by their lease tokens, are noted as giving their slots to others.
        """
        choice = self._choice(pools, holders)
        with service_transaction(self._engine) as session:
            fairest = turns.find_fairest_job(session, choice)
        if fairest is None or fairest.pool == choice.pool or fairest.is_behind:
            return None
        with service_transaction(self._engine) as session:
            next_pool = turns.choose_pool(session, choice)
            if next_pool in (None, choice.pool):
                return None
            turns.mark_lending(session, held)
        return next_pool

    def lend(self, *, held: Sequence[int], wanting: Sequence[int]) -> Loan | None:
        """Return the slot to lend now, or None. `wanting` are the held jobs that lack memory, by their lease tokens."""
        assert self._base.pool is not None
        quantum = self._settings.quantum_seconds
        terms = SlotTerms(quantum, slot_seconds(quantum, slots=self._base.slots))
        with service_transaction(self._engine) as session:
            return turns.lend_slot(
                session,
                self._base.pool,
                worker_name=self._name,
                held=held,
                terms=terms,
                wanting=wanting,
            )

    def _choice(self, pools: Sequence[str], holders: Sequence[uuid.UUID] = ()) -> PoolChoice:
        return PoolChoice(
            worker_name=self._name,
            pools=tuple(pools),
            pool=self._base.pool,
            keeps_pool=not self.is_over,
            turn_seconds=self._settings.turn_seconds,
            holders=tuple(holders),
        )
