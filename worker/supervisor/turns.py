"""When this worker shares what it has: its base, turn by turn, with its other pools, and its slots with other tenants.

The database decides (core.services.turns). This module measures how long the base has been held, and asks no more often
than it must: with one pool there is no choice of bases, and with a free slot no slot is lent.

A pool's turn ends in three steps. Its held jobs are asked to leave, and no job is claimed while they do. When the last
has left, the base of the next pool is loaded. The jobs that left are queued, and return at their pool's next turn.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

import structlog
from sqlalchemy import Engine

from core.db.models import BaseModelRow
from core.db.session import DATABASE_ERRORS, service_transaction
from core.domain.scheduling import slot_seconds
from core.services import announcements, turns
from core.services.turns import Loan, PoolChoice, SlotTerms
from core.settings import WorkerSettings
from worker.supervisor.bases import BaseHolder
from worker.supervisor.departures import Departures
from worker.supervisor.findings import BaseFindings
from worker.supervisor.held_jobs import HeldJobs

log = structlog.get_logger()
_LOOK_SECONDS = 2.0


class TurnKeeper:
    """Switches the base when another pool's turn has come. Only the serving thread calls it.

    `next_pool` is the pool that comes next, while the held jobs leave for its turn or its base is being loaded.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        name: str,
        engine: Engine,
        base: BaseHolder,
        findings: BaseFindings,
        jobs: HeldJobs,
        departures: Departures,
        stop_requested: threading.Event,
    ) -> None:
        self._settings, self._name = settings, name
        self._engine = engine
        self._base = base
        self._findings = findings
        self._jobs = jobs
        self._departures = departures
        self._stop_requested = stop_requested
        self._looked_at = 0.0
        self._next_pool: str | None = None

    @property
    def next_pool(self) -> str | None:
        return self._next_pool

    def hold_pool_with_work(self) -> bool:
        """Hold the base of a pool that has work, and return whether there is one. Call it while no job is held."""
        with service_transaction(self._engine) as session:
            bases = self._findings.find_loadable(session)
        pool = self._next_pool = self._choose_pool(tuple(bases))
        if pool is None:
            return False
        if pool != self._base.pool or not self._base.is_alive:
            self._load(pool, bases[pool])
            if self._base.pool == pool:  # if a first look refused it, the old trainer is still there
                self._departures.note_all()
        self._next_pool = None
        return True

    def end_if_due(self) -> bool:
        """Before a claim, let the held jobs leave if another pool's turn has come, and say so.

        The database is asked when a slot came free, or when it was not asked for a while.
        """
        has_one_left = self._jobs.has_one_left()
        return self._is_over and (has_one_left or self._is_look_due()) and self._end()

    def lend_slot(self, *, has_room: bool) -> None:
        """Give a slot to a tenant that has used less and waits, if one of these slots has had its quantum."""
        wanting = [held.lease.token for held in self._jobs if held.wants_memory]
        if (has_room and not wanting) or not self._is_look_due():
            return
        if (self._is_over and self._end()) or any(held.is_yielding for held in self._jobs):
            return
        loan = self._find_loan(wanting=wanting)
        if loan is None:
            return
        log.info("slot.lent", lease_token=loan.lease_token)
        # Jobs that wait for memory are admitted in the order in which they came. So these leave, and return behind the
        # borrower.
        leaving = [token for token in wanting if loan.borrower not in (None, token)]
        for token in (loan.lease_token, *leaving):
            if (held := self._jobs.find(token)) is not None:
                self._jobs.give_back(held)

    @property
    def _is_over(self) -> bool:
        """Whether another pool may have its turn."""
        length = self._settings.fairness_terms.turn_length(self._base.load_seconds)
        return len(self._settings.worker_pools) > 1 and self._base.held_seconds >= length

    def _is_look_due(self) -> bool:
        """Say whether it is time to look for waiting jobs, and count that as a look."""
        is_due = time.monotonic() - self._looked_at >= _LOOK_SECONDS
        if is_due:
            self._looked_at = time.monotonic()
        return is_due

    def _choose_pool(self, pools: Sequence[str]) -> str | None:
        """Return which of these pools a worker without jobs serves next, or None if none has work for it.

        A pool whose turn was promised comes first, because the jobs that left for it wait too, and may be older.
        """
        choice = self._choice(pools)
        if self._next_pool is not None:
            choice = replace(choice, pool=self._next_pool, keeps_pool=True)
        with service_transaction(self._engine) as session:
            return turns.choose_pool(session, choice)

    def _load(self, pool: str, base: BaseModelRow) -> None:
        """Load a base that jobs wait for, and announce it to the first of them, unless the last try has failed."""
        waiting: Sequence[uuid.UUID] = ()
        if not self._findings.was_refused(pool):
            with contextlib.suppress(*DATABASE_ERRORS), service_transaction(self._engine) as session:
                waiting = announcements.announce_load(session, pool, base_model_id=base.id, num_jobs=base.slots)
        self._base.load(pool, base)
        if not waiting or self._stop_requested.is_set():
            return
        with contextlib.suppress(*DATABASE_ERRORS), service_transaction(self._engine) as session:
            if self._findings.was_refused(pool):
                announcements.announce_unloaded(session, waiting, base_model_id=base.id)
            else:
                announcements.announce_loaded(session, waiting, seconds=self._base.load_seconds)

    def _end(self) -> bool:
        """Let the held jobs leave if the job that is next is another pool's, and say so."""
        with service_transaction(self._engine) as session:
            bases = self._findings.find_loadable(session)
        # A pool refused lately is tried again only by an idle worker, where the try costs no slot.
        pools = [pool for pool in bases if pool == self._base.pool or not self._findings.was_refused(pool)]
        next_pool = self._find_next_pool(pools)
        if next_pool is None:
            return False
        log.info("pool.turn_ended", pool=self._base.pool, next_pool=next_pool, num_jobs=len(self._jobs))
        self._next_pool = next_pool
        self._jobs.give_all_back()
        return True

    def _find_next_pool(self, pools: Sequence[str]) -> str | None:
        """Return which of these pools has its turn now, or None while the job that is next is that of the held base.

        The attempts that are held are noted as giving their slots to others.
        """
        choice = self._choice(pools, [held.lease.tenant_id for held in self._jobs])
        with service_transaction(self._engine) as session:
            fairest = turns.find_fairest_job(session, choice)
        if fairest is None or fairest.pool == choice.pool or fairest.is_behind:
            return None
        with service_transaction(self._engine) as session:
            next_pool = turns.choose_pool(session, choice)
            if next_pool in (None, choice.pool):
                return None
            turns.mark_lending(session, self._jobs.tokens)
        return next_pool

    def _find_loan(self, *, wanting: Sequence[int]) -> Loan | None:
        """Return the slot to lend now, or None. `wanting` are the held jobs that lack memory, by their lease tokens."""
        assert self._base.pool is not None
        quantum = self._settings.quantum_seconds
        terms = SlotTerms(quantum, slot_seconds(quantum, slots=self._base.slots))
        with service_transaction(self._engine) as session:
            return turns.lend_slot(
                session,
                self._base.pool,
                worker_name=self._name,
                held=self._jobs.tokens,
                terms=terms,
                wanting=wanting,
            )

    def _choice(self, pools: Sequence[str], holders: Sequence[uuid.UUID] = ()) -> PoolChoice:
        return PoolChoice(
            worker_name=self._name,
            pools=tuple(pools),
            pool=self._base.pool,
            keeps_pool=not self._is_over,
            turn_seconds=self._settings.turn_seconds,
            holders=tuple(holders),
        )
