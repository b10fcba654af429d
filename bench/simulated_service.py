"""The service's own database and statements on a simulated clock: the database's `now()` is read from a table."""

from __future__ import annotations

import uuid
from collections import defaultdict
from dataclasses import dataclass, field

import psycopg
from psycopg import sql
from sqlalchemy import Engine, text

from core.db.migrate import RoleLogin
from core.db.session import connect, service_transaction
from core.domain.bases import BaseModelEntry, BaseModelSource, Registry
from core.domain.jobs import pool_name
from core.domain.leases import Lease
from core.services import charges
from local.stack import prepare_database

BASE = "acme-labs/tiny"
POOLS = (pool_name(BASE, None), pool_name(BASE, "nf4"))
LOGIN = RoleLogin("espalier_worker", "bench")
STEP_SECONDS = 1.0  # of a lonely job
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
