"""A worker's loop, which decides by the service's own statements, with simulated trainers.

Each job has a number of seconds of work, and n jobs together run at 1 / (1 + 0.4 (n - 1)) of the speed of a single one,
about like the fused engine. Loading a base takes 40 s, and a slot that is given back is free 5 s later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlalchemy import Engine

from bench.simulated_service import POOLS, Service
from core.db.session import service_transaction
from core.domain.failures import Failure
from core.domain.leases import Lease
from core.domain.scheduling import QUANTUM_SECONDS, FairnessTerms, slot_seconds
from core.domain.workers import WorkerFacts
from core.services import attempts, charges, claims, turns
from core.services.turns import PoolChoice, SlotTerms
from core.services.workers import record_worker

SLOTS = 8
LOAD_SECONDS, LEAVE_SECONDS = 40.0, 5.0
TICK_SECONDS, LOOK_SECONDS, CHARGE_SECONDS, BEAT_SECONDS = 5.0, 20.0, 30.0, 60.0


@dataclass
class Slot:
    """A job in a slot; `left` seconds of lonely work remain, `used` counts the attempt's device seconds."""

    lease: Lease
    tenant: str
    left: float
    used: float = 0.0
    leaves_at: float | None = None


class SimulatedWorker:
    """What a worker's loop decides, by the services that it calls, on simulated trainers."""

    def __init__(self, service: Service, engine: Engine, name: str) -> None:
        self._service, self._engine, self._name = service, engine, name
        self._pool: str | None = None
        self._slots: dict[int, Slot] = {}
        self._held_since, self._loaded_at = 0.0, 0.0
        self._looked_at = self._charged_at = self._beat_at = -1e9
        self._next_pool: str | None = None

    @property
    def _is_over(self) -> bool:
        return self._service.now - self._held_since >= FairnessTerms().turn_length(LOAD_SECONDS)

    def tick(self) -> None:
        self._beat()
        if self._service.now < self._loaded_at:
            return
        self._train()
        self._charge()
        if not self._slots:
            self._hold_pool_with_work()
        elif self._next_pool is None and len(self._slots) == SLOTS and self._is_due() and not self._ends_turn():
            self._lend()
        if self._service.now >= self._loaded_at and self._pool is not None:
            self._fill_slots()

    def _beat(self, *, is_due: bool = False) -> None:
        if not is_due and self._service.now - self._beat_at < BEAT_SECONDS:
            return
        self._beat_at = self._service.now
        facts = WorkerFacts(
            name=self._name,
            pools=POOLS,
            state="loading" if self._service.now < self._loaded_at else "serving" if self._slots else "idle",
            pool=self._pool,
            slots=SLOTS if self._pool else 0,
            slots_in_use=len(self._slots),
            next_pool=self._next_pool,
        )
        with service_transaction(self._engine) as session:
            record_worker(session, facts, alive_seconds=3 * BEAT_SECONDS, is_start=False)

    def _is_due(self) -> bool:
        is_due = self._service.now - self._looked_at >= LOOK_SECONDS
        if is_due:
            self._looked_at = self._service.now
        return is_due

    def _train(self) -> None:
        training = [slot for slot in self._slots.values() if slot.leaves_at is None]
        for slot in training:
            slot.left -= TICK_SECONDS / (1 + 0.4 * (len(training) - 1))
            slot.used += TICK_SECONDS / len(training)
            self._service.used[slot.tenant] += TICK_SECONDS / len(training)
        for slot in tuple(self._slots.values()):
            if slot.leaves_at is not None and self._service.now >= slot.leaves_at:
                self._give_back(slot)
            elif slot.left <= 0:
                self._end(slot)

    def _give_back(self, slot: Slot) -> None:
        self._service.left[slot.lease.job_id] = slot.left
        with service_transaction(self._engine) as session:
            attempts.requeue_attempt(session, slot.lease)
        self._book(slot)

    def _end(self, slot: Slot) -> None:
        with service_transaction(self._engine) as session:
            attempts.fail_attempt(session, slot.lease, failure=Failure(code="over", message="Over."), is_job_fault=True)
        self._book(slot)

    def _book(self, slot: Slot) -> None:
        del self._slots[slot.lease.token]
        with service_transaction(self._engine) as session:
            charges.record_usage(session, slot.lease.token, gpu_seconds=slot.used, trained_tokens=1)

    def _charge(self) -> None:
        if not self._slots or self._service.now - self._charged_at < CHARGE_SECONDS:
            return
        self._charged_at = self._service.now
        with service_transaction(self._engine) as session:
            charges.charge_use(session, {token: slot.used for token, slot in self._slots.items()})

    def _choice(self) -> PoolChoice:
        holders = tuple({slot.lease.tenant_id for slot in self._slots.values()})
        return PoolChoice(self._name, POOLS, self._pool, keeps_pool=not self._is_over, holders=holders)

    def _hold_pool_with_work(self) -> None:
        choice = self._choice()
        if self._next_pool is not None:  # whose turn was promised
            choice = replace(choice, pool=self._next_pool, keeps_pool=True)
        with service_transaction(self._engine) as session:
            pool = turns.choose_pool(session, choice)
        self._next_pool = None
        if pool is None or pool == self._pool:
            return
        self._pool, self._loaded_at = pool, self._service.now + LOAD_SECONDS
        self._held_since = self._loaded_at
        self._service.num_loads += 1
        self._service.load_seconds += LOAD_SECONDS
        self._beat(is_due=True)

    def _ends_turn(self) -> bool:
        if not self._is_over or self._pool is None:
            return False
        with service_transaction(self._engine) as session:
            pool = turns.choose_pool(session, self._choice())
            if pool in (None, self._pool):
                return False
            turns.mark_lending(session, tuple(self._slots))
        self._next_pool = pool
        for slot in self._slots.values():
            self._leave(slot)
        return True

    def _lend(self) -> None:
        if any(slot.leaves_at is not None for slot in self._slots.values()) or self._pool is None:
            return
        terms = SlotTerms(QUANTUM_SECONDS, slot_seconds(QUANTUM_SECONDS, slots=SLOTS))
        with service_transaction(self._engine) as session:
            loan = turns.lend_slot(session, self._pool, worker_name=self._name, held=tuple(self._slots), terms=terms)
        if loan is not None:
            self._leave(self._slots[loan.lease_token])

    def _leave(self, slot: Slot) -> None:
        if slot.leaves_at is None:
            slot.leaves_at = self._service.now + LEAVE_SECONDS
            self._service.num_lent += 1

    def _fill_slots(self) -> None:
        assert self._pool is not None
        while len(self._slots) < SLOTS and self._next_pool is None and not self._ends_turn():
            with service_transaction(self._engine) as session:
                job = claims.claim_job(
                    session, self._pool, worker_name=self._name, lease_seconds=1e6, is_idle=not self._slots
                )
            if job is None or job.lease_token is None:
                return
            self._start(Lease(job.id, job.tenant_id, job.lease_token))

    def _start(self, lease: Lease) -> None:
        tenant = next(slug for slug, id_ in self._service.tenants.items() if id_ == lease.tenant_id)
        self._slots[lease.token] = Slot(lease, tenant, self._service.left.pop(lease.job_id))
        self._service.begin_steps(lease)
        arrival = self._service.arrivals[lease.job_id]
        if arrival not in self._service.started:
            self._service.started.add(arrival)
            self._service.waits[tenant].append(self._service.now - arrival.at)
