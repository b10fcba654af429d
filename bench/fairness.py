"""Is device time shared by weight, and does nobody wait for long? Days of a service, simulated on its own SQL.

    python -m bench.fairness [--hours 48] > bench/fairness.md

The statements are those of the service: claims, charges, lent slots, turns of pools, and newcomers made level, in the
roles of worker and schedule. What is simulated is time, because the database's `now()` is read from a table, and
training: each job has so many seconds of work, and n jobs together go at 1 / (1 + 0.4 (n - 1)) of a lonely one's speed,
about what the fused engine does. A load of a base takes 40 s, a slot that is given back is free 5 s later.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy import Engine, text

from core.db.migrate import RoleLogin, login_url
from core.db.session import connect, service_transaction
from core.domain.bases import BaseModelEntry, BaseModelSource, Registry
from core.domain.jobs import pool_name
from core.domain.leases import Lease
from core.domain.scheduling import QUANTUM_SECONDS, FairnessTerms, slot_seconds
from core.domain.workers import WorkerFacts
from core.services import attempts, charges, claims, turns
from core.services.turns import PoolChoice, SlotTerms
from core.services.workers import record_worker
from local.servers import LocalServers
from local.stack import prepare_database

BASE = "acme-labs/tiny"
POOLS = (pool_name(BASE, None), pool_name(BASE, "nf4"))
LOGIN = RoleLogin("espalier_worker", "bench")
SLOTS = 8
LOAD_SECONDS, LEAVE_SECONDS = 40.0, 5.0
TICK_SECONDS, LOOK_SECONDS, CHARGE_SECONDS, BEAT_SECONDS = 5.0, 20.0, 30.0, 60.0
STEP_SECONDS = 1.0  # of a lonely job
WINDOW_SECONDS = 4 * 3600.0
FOREVER = 10**9
CLOCK = """
create schema sim;
create table sim.clock (at timestamptz not null);
insert into sim.clock values (pg_catalog.now());
create function sim.now() returns timestamptz language sql stable as 'select at from sim.clock';
grant usage on schema sim to public;
grant select on sim.clock to public;
do $$ declare c record; begin
    for c in select table_name, column_name from information_schema.columns
        where table_schema = 'public' and column_default = 'now()' loop
        execute format('alter table %I alter column %I set default sim.now()', c.table_name, c.column_name);
    end loop;
end $$;
"""
TENANT = """
insert into tenants (id, slug, name, weight, max_running, max_queued)
values (:id, :slug, :slug, :weight, 1000, 100000)
"""
FILE = """
insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status)
values (:id, :id, 'a', 'fine-tune', 1, repeat('0', 64), 'k', 4, 'processed')
"""
JOB = """
insert into jobs (id, tenant_id, base_model_id, pool, quantization, training_file_id, spec, total_steps, status)
select uuidv7(), :tenant, :base, :pool, :quantization, :tenant, '{}', :steps, 'queued' from generate_series(1, :count)
"""
FIRST_STEP = """
with job as (
    update jobs set trained_steps = trained_steps + 1 where id = :job and lease_token = :token returning *
)
insert into metrics (job_id, step, tenant_id, lease_token, train_loss, train_accuracy, learning_rate, grad_norm,
    num_tokens) select id, trained_steps, tenant_id, :token, 1, 1, 1, 1, 1 from job
"""
STEPPING = "update attempts set stepping_at = now() where lease_token = :token"


@dataclass(frozen=True)
class Arrival:
    """Jobs that a tenant submits at an instant: so many, of so many seconds of work each."""

    at: float
    tenant: str
    pool: str
    seconds: float
    count: int = 1


@dataclass
class Slot:
    """A job in a slot; `left` seconds of lonely work remain, `used` counts the attempt's device seconds."""

    lease: Lease
    tenant: str
    left: float
    used: float = 0.0
    leaves_at: float | None = None


@dataclass
class Service:
    """The database, whose clock is ours, and what was submitted and measured."""

    engine: Engine
    tenants: dict[str, uuid.UUID] = field(default_factory=dict)
    now: float = 0.0
    left: dict[uuid.UUID, float] = field(default_factory=dict)  # seconds of work of jobs without a slot
    arrivals: dict[uuid.UUID, Arrival] = field(default_factory=dict)  # of jobs that came with none before them
    started: set[Arrival] = field(default_factory=set)
    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    used: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_lent: int = 0
    num_loads: int = 0
    load_seconds: float = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds
        with service_transaction(self.engine) as session:
            session.execute(text("update sim.clock set at = at + make_interval(secs => :s)"), {"s": seconds})

    def add_tenant(self, slug: str, weight: float) -> None:
        self.tenants[slug] = tenant_id = uuid.uuid4()
        with service_transaction(self.engine) as session:
            session.execute(text(TENANT), {"id": tenant_id, "slug": slug, "weight": weight})
            session.execute(text(FILE), {"id": tenant_id})

    def submit(self, arrival: Arrival) -> None:
        values = {
            "tenant": self.tenants[arrival.tenant],
            "base": BASE,
            "pool": arrival.pool,
            "quantization": "nf4" if arrival.pool == POOLS[1] else None,
            "steps": min(FOREVER, int(arrival.seconds / STEP_SECONDS)),
            "count": arrival.count,
        }
        with service_transaction(self.engine) as session:
            for job_id in session.scalars(text(JOB + " returning id"), values):
                self.left[job_id], self.arrivals[job_id] = arrival.seconds, arrival
            charges.level_newcomer(session, self.tenants[arrival.tenant])

    def begin_steps(self, lease: Lease) -> None:
        """Show that an attempt steps, and that it has done a step: it may be lent a quantum later."""
        with service_transaction(self.engine) as session:
            session.execute(text(STEPPING), {"token": lease.token})
            session.execute(text(FIRST_STEP), {"job": lease.job_id, "token": lease.token})


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
        elif self._next_pool is None and len(self._slots) == SLOTS and self._is_due():
            self._ends_turn() or self._lend()
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
            attempts.fail_attempt(session, slot.lease, code="over", message="Over.", is_job_fault=True)
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


@dataclass
class Outcome:
    """What a run showed: waits by tenant, the worst deviation from weights in any window, loads."""

    service: Service
    worst_share: dict[str, tuple[float, float]]
    hours: float
    num_workers: int


def simulate(
    owner_url: str,
    name: str,
    *,
    weights: dict[str, float],
    arrivals: Iterable[Arrival],
    steady: tuple[str, ...],
    num_workers: int,
    hours: float,
) -> Outcome:
    """Run one scenario on a database of its own. `steady` tenants have work from their first arrival to the end."""
    engine = make_database(owner_url, name)
    worker_engine = connect(login_url(owner_url.rpartition("/")[0] + f"/{name}", LOGIN))
    service = Service(engine)
    for slug, weight in weights.items():
        service.add_tenant(slug, weight)
    workers = [SimulatedWorker(service, worker_engine, f"worker-{number}") for number in range(num_workers)]
    coming = sorted(arrivals, key=lambda arrival: arrival.at)
    began = {slug: min(a.at for a in coming if a.tenant == slug) for slug in steady}
    seen: list[tuple[float, dict[str, float]]] = []
    while service.now < hours * 3600:
        while coming and coming[0].at <= service.now:
            service.submit(coming.pop(0))
        for worker in workers:
            worker.tick()
        seen.append((service.now, dict(service.used)))
        service.advance(TICK_SECONDS)
    engine.dispose()
    worker_engine.dispose()
    return Outcome(service, worst_shares(seen, weights, began), hours, num_workers)


def worst_shares(
    seen: list[tuple[float, dict[str, float]]], weights: dict[str, float], began: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """Return the least and greatest part that each steady tenant had in any window of what its weight gives it."""
    worst = dict.fromkeys(began, (9.0, 0.0))
    length = int(WINDOW_SECONDS / TICK_SECONDS)
    for first, last in zip(seen[:-length:12], seen[length::12], strict=False):
        present = [slug for slug, at in began.items() if at <= first[0]]
        used = {slug: last[1].get(slug, 0.0) - first[1].get(slug, 0.0) for slug in present}
        if len(present) < 2 or not sum(used.values()):  # alone it has what it wants
            continue
        for slug in present:
            entitled = weights[slug] / sum(weights[other] for other in present)
            part = used[slug] / sum(used.values()) / entitled
            worst[slug] = (min(worst[slug][0], part), max(worst[slug][1], part))
    return worst


def make_database(owner_url: str, name: str) -> Engine:
    with psycopg.connect(owner_url, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    url = owner_url.rpartition("/")[0] + f"/{name}"
    entry = BaseModelEntry(
        id=BASE,
        source=BaseModelSource(kind="path", location="/"),
        target_modules=("q_proj",),
        quantizations=("nf4",),
        max_seq_len=64,
    )
    prepare_database(url, Registry(base_models=(entry,)), logins=(LOGIN,))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(CLOCK)
        # Named before pg_catalog, so that every statement's now() is the simulated one.
        set_path = sql.SQL("alter database {} set search_path = sim, public, pg_catalog")
        connection.execute(set_path.format(sql.Identifier(name)))
    return connect(url)


def poisson(draw: random.Random, *, every: float, hours: float, since: float = 0.0) -> Iterator[float]:
    at = since
    while (at := at + draw.expovariate(1 / every)) < hours * 3600:
        yield at


def whale_and_others(owner_url: str, hours: float) -> Outcome:
    """One worker, two pools: a whale whose jobs never end, beside it 2 min an hour, elsewhere 10 min each 30."""
    draw = random.Random(1)
    plain, nf4 = POOLS
    arrivals = [Arrival(0.0, "whale", plain, FOREVER, 48)]
    arrivals += [Arrival(at, "small", plain, 120.0) for at in poisson(draw, every=3600, hours=hours)]
    arrivals += [Arrival(at, "other-pool", nf4, 600.0) for at in poisson(draw, every=1800, hours=hours)]
    weights = {"whale": 1.0, "small": 1.0, "other-pool": 1.0}
    return simulate(owner_url, "whale", weights=weights, arrivals=arrivals, steady=(), num_workers=1, hours=hours)


def weights_in_one_pool(owner_url: str, hours: float) -> Outcome:
    """One worker, one pool: endless work of weights 1, 1 and 2; the second tenant comes after 12 hours."""
    (plain, _) = POOLS
    arrivals = [
        Arrival(0.0, "weight-1", plain, FOREVER, 48),
        Arrival(0.0, "weight-2", plain, FOREVER, 48),
        Arrival(12 * 3600.0, "newcomer", plain, FOREVER, 48),
    ]
    weights = {"weight-1": 1.0, "weight-2": 2.0, "newcomer": 1.0}
    return simulate(
        owner_url, "one_pool", weights=weights, arrivals=arrivals, steady=tuple(weights), num_workers=1, hours=hours
    )


def weights_in_two_pools(owner_url: str, hours: float) -> Outcome:
    """One worker, two pools: endless work of weight 1 in the one and of weight 2 in the other."""
    plain, nf4 = POOLS
    arrivals = [Arrival(0.0, "weight-1", plain, FOREVER, 48), Arrival(0.0, "weight-2", nf4, FOREVER, 48)]
    weights = {"weight-1": 1.0, "weight-2": 2.0}
    return simulate(
        owner_url, "two_pools", weights=weights, arrivals=arrivals, steady=tuple(weights), num_workers=1, hours=hours
    )


def sprinters_on_eight_workers(owner_url: str, hours: float) -> Outcome:
    """Eight workers, two pools: two whales of weight 1 and 2, three tenants that submit ten jobs of 3 min every 2 h."""
    draw = random.Random(2)
    plain, nf4 = POOLS
    arrivals = [Arrival(0.0, "whale", plain, FOREVER, 200), Arrival(0.0, "whale-2", nf4, FOREVER, 200)]
    for number in range(3):
        pool = POOLS[number % 2]
        arrivals += [
            Arrival(at, f"sprinter-{number}", pool, 180.0, 10) for at in poisson(draw, every=7200, hours=hours)
        ]
    weights = {"whale": 1.0, "whale-2": 2.0} | {f"sprinter-{number}": 1.0 for number in range(3)}
    return simulate(
        owner_url,
        "eight",
        weights=weights,
        arrivals=arrivals,
        steady=("whale", "whale-2"),
        num_workers=8,
        hours=hours,
    )


SCENARIOS: tuple[Callable[[str, float], Outcome], ...] = (
    whale_and_others,
    weights_in_one_pool,
    weights_in_two_pools,
    sprinters_on_eight_workers,
)


def report(scenario: Callable[[str, float], Outcome], outcome: Outcome) -> None:
    service = outcome.service
    loading = service.load_seconds / (outcome.hours * 3600 * outcome.num_workers)
    print(f"\n## {(scenario.__doc__ or '').strip()}\n")
    print(f"{service.num_loads} loads ({loading:.1%} of the time), {service.num_lent} slots given to others.\n")
    print("| tenant | device hours | submissions | first start, median | worst | least and greatest share in 4 h |")
    print("|---|---|---|---|---|---|")
    for slug in service.tenants:
        waits = service.waits[slug]
        cells = [slug, f"{service.used[slug] / 3600:.1f}", str(len(waits))]
        cells += [f"{statistics.median(waits):.0f} s", f"{max(waits):.0f} s"] if waits else ["-", "-"]
        least, greatest = outcome.worst_share.get(slug, (0.0, 0.0))
        cells.append(f"{least:.2f} to {greatest:.2f} of its weight" if greatest else "-")
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=48.0)
    parser.add_argument("--only", type=int, help="one scenario, by its number from 0")
    given = parser.parse_args()
    print(f"# Fair in time\n\n`python -m bench.fairness --hours {given.hours:g}`")
    scenarios = SCENARIOS if given.only is None else SCENARIOS[given.only : given.only + 1]
    with tempfile.TemporaryDirectory() as directory, LocalServers(Path(directory), is_durable=False) as servers:
        for scenario in scenarios:
            report(scenario, scenario(servers.addresses.postgres_url, given.hours))


if __name__ == "__main__":
    main()
