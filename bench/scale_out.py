"""The limits of one control plane: up to 200 workers, 10,000 jobs, 1,000 tenants: `python -m bench.scale_out`.

    python -m bench.scale_out [--workers 1 10 50 100 200] [--seconds 60] [--step-seconds 5]

PostgreSQL, Redis and the schedule are real processes. The workers are real supervisors (worker.supervisor: claims,
leases, progress, presence, charges, proofs) in threads of a few driver processes (bench.stub_workers). Each has a stub
instead of its trainer: it loads a base in 2 s, then takes one fused step of all its jobs every `--step-seconds`. The
stub writes no adapter, and the supervisor's read back of one is skipped.

A real deployment also has: a supervisor's own three connections to PostgreSQL (here a driver's supervisors share a pool
of them), Celery between Redis and the worker, the object store's traffic, and more machines. Here all run on the same
cores, so the last rows show the limits of these cores and not of PostgreSQL.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psycopg
import redis
from psycopg import sql
from sqlalchemy import text

from bench.stub_workers import BASES, LOAD_SECONDS, STEPS_AN_EPOCH, Tally
from bench.workload import command, machine
from core.db.migrate import RoleLogin, login_url
from core.db.session import TenantSession, connect, service_transaction, tenant_transaction
from core.domain.bases import BaseModelEntry, BaseModelSource, Registry
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.job_requests import JobRequest
from core.domain.objects import file_key
from core.services.files import create_file
from core.services.submissions import submit_job
from local.processes import ChildProcess, ProcessSpec
from local.servers import LocalServers, ServerAddresses
from local.stack import prepare_database
from tests.processes import storage_settings

NUM_TENANTS, NUM_JOBS = 1_000, 10_000
SLOTS = 8
MAX_EPOCHS = 5  # jobs of 8 to 40 steps
WORKERS_A_DRIVER = 50
LOGINS = {role: RoleLogin(f"espalier_{role}", "bench") for role in ("worker", "schedule")}
COLUMNS = (
    "workers",
    "all at work after, s (wake-ups)",
    "claims/s",
    "claim, ms p50 / p99",
    "heartbeat, ms",
    "progress, ms",
    "steps/s (of what the devices could)",
    "transactions/s",
    "database, cores",
    "supervisors, cores",
    "leases lost",
)
TENANTS = """
insert into tenants (id, slug, name, max_running, max_queued)
select gen_random_uuid(), 't' || n, 't' || n, 64, 10000 from generate_series(2, :count) n
"""
FILES = """
insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status)
select gen_random_uuid(), t.id, 'a', 'fine-tune', 1, repeat('0', 64), 'tenants/' || t.id || '/files/a', :examples,
    'processed' from tenants t where not exists (select from files f where f.tenant_id = t.id)
"""
# A tenant's share of the jobs falls with its number, as in a service where few have most of them.
JOBS = """
insert into jobs (id, tenant_id, base_model_id, pool, training_file_id, spec, total_steps, status)
select uuidv7(), t.id, j.base_model_id, j.pool, f.id, j.spec, j.total_steps, 'queued'
from generate_series(1, :count) n
join lateral (select id from tenants order by slug offset floor(power(random(), 3) * :tenants + n * 0)::int limit 1) t
    on true
join lateral (select id from files where tenant_id = t.id limit 1) f on true
join lateral (select * from jobs where id = any(:templates) order by random() + n * 0 limit 1) j on true
"""


@dataclass(frozen=True)
class Sample:
    """What the database has done by an instant."""

    at: float
    num_transactions: int
    cpu_seconds: float
    num_steps: int
    num_lost: int

    @classmethod
    def take(cls, owner_url: str) -> Sample:
        with psycopg.connect(owner_url, autocommit=True) as connection:
            (commits,) = connection.execute(
                "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()"
            ).fetchone() or (0,)
            (steps,) = connection.execute("select coalesce(sum(trained_steps), 0) from jobs").fetchone() or (0,)
            (lost,) = connection.execute("select count(*) from attempts where outcome = 'lost'").fetchone() or (0,)
            (postmaster,) = connection.execute("select pg_backend_pid()").fetchone() or (0,)
        parent = int(_stat_of(postmaster)[1])
        return cls(time.monotonic(), int(commits), _cpu_seconds_below(parent), int(steps), int(lost))


def _stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()


def _cpu_seconds_below(parent: int) -> float:
    """Return what a process and its children have used, those that have ended included."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = _stat_of(int(entry.name))
            except (OSError, ProcessLookupError):
                continue
            if int(entry.name) == parent:
                ticks += sum(map(int, fields[11:15]))
            elif int(fields[1]) == parent:
                ticks += sum(map(int, fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


class Drivers:
    """The driver processes of so many workers."""

    def __init__(self, num_workers: int, env: dict[str, str], *, step_seconds: float) -> None:
        firsts = range(0, num_workers, WORKERS_A_DRIVER)
        ranges = [(first, min(first + WORKERS_A_DRIVER, num_workers)) for first in firsts]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.stub_workers", str(first), str(end), "--step-seconds", str(step_seconds)],
                env={**os.environ, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for first, end in ranges
        ]

    def look(self) -> Tally:
        """Return what all of them have measured since the last look."""
        for process in self._processes:
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
        total = Tally()
        for process in self._processes:
            assert process.stdout is not None
            for name, value in json.loads(process.stdout.readline()).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def stop(self) -> None:
        for process in self._processes:
            process.communicate()


@contextmanager
def running_drivers(num_workers: int, env: dict[str, str], *, step_seconds: float) -> Iterator[Drivers]:
    drivers = Drivers(num_workers, env, step_seconds=step_seconds)
    try:
        yield drivers
    finally:
        drivers.stop()


def prepare(owner_url: str) -> None:
    """Make the tenants and their jobs, all queued."""
    entries = tuple(
        BaseModelEntry(
            id=base,
            source=BaseModelSource(kind="path", location="/"),
            target_modules=("q_proj",),
            max_seq_len=64,
            slots=SLOTS,
        )
        for base in BASES
    )
    prepare_database(owner_url, Registry(base_models=entries), logins=tuple(LOGINS.values()))
    engine = connect(owner_url)
    tenant_id = uuid.uuid4()
    with tenant_transaction(engine, tenant_id, actor="bench") as session:
        templates = submit_templates(session, tenant_id)
    with service_transaction(engine) as session:
        session.execute(text(TENANTS), {"count": NUM_TENANTS})
        session.execute(text(FILES), {"examples": STEPS_AN_EPOCH})
        count = NUM_JOBS - len(templates)
        session.execute(text(JOBS), {"count": count, "tenants": NUM_TENANTS, "templates": templates})
    with psycopg.connect(owner_url, autocommit=True) as connection:
        connection.execute("analyze")
    engine.dispose()


def submit_templates(session: TenantSession, tenant_id: uuid.UUID) -> list[uuid.UUID]:
    """Submit one job of each base and length, by the service's own way, and return their ids."""
    file_id = new_id()
    first = "insert into tenants (id, slug, name, max_running, max_queued) values (:id, 't1', 't1', 64, 10000)"
    session.execute(text(first), {"id": tenant_id})
    key = file_key(tenant_id, file_id)
    new = NewFile(file_id, "a", "fine-tune", key, 1, "0" * 64, num_examples=STEPS_AN_EPOCH)
    create_file(session, tenant_id, new=new)
    requests = [
        JobRequest(base_model_id=base, training_file_id=file_id, n_epochs=epochs, batch_size=1, learning_rate=1e-4)
        for base in BASES
        for epochs in range(1, MAX_EPOCHS + 1)
    ]
    return [submit_job(session, tenant_id, request=request).id for request in requests]


def environment(addresses: ServerAddresses, url: str, role: str) -> dict[str, str]:
    storage = addresses.storage
    return {
        "ESPALIER_DATABASE_URL": login_url(url, LOGINS[role]),
        "ESPALIER_REDIS_URL": addresses.redis_url,
        **storage_settings(storage),
    }


def measure(addresses: ServerAddresses, directory: Path, *, num_workers: int, options: argparse.Namespace) -> str:
    """Run so many workers on a database of their own, and return their row of the table."""
    name = f"scale_{num_workers}"
    with psycopg.connect(addresses.postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    url = addresses.postgres_url.rpartition("/")[0] + f"/{name}"
    prepare(url)
    redis.Redis.from_url(addresses.redis_url).flushall()
    env = environment(addresses, url, "worker")
    with running_drivers(num_workers, env, step_seconds=options.step_seconds) as drivers:
        drivers.look()  # all workers are there, and idle
        spec = ProcessSpec("schedule", [sys.executable, "-m", "schedule"], environment(addresses, url, "schedule"))
        schedule = ChildProcess(spec, directory / "logs")
        scaling = time_scaling(drivers, num_workers)
        time.sleep(LOAD_SECONDS + 3)
        window = Window.measure(drivers, url, seconds=options.seconds)
        schedule.stop()
    return describe(num_workers, scaling, window, step_seconds=options.step_seconds)


def time_scaling(drivers: Drivers, num_workers: int) -> str:
    """Return how long it takes, with work for everybody, until everybody is at work, and how many wake-ups."""
    started, num_wake_ups = time.monotonic(), 0
    while True:
        seen = drivers.look()
        num_wake_ups += seen.num_wake_ups
        if seen.num_serving == num_workers:
            return f"{time.monotonic() - started:.1f} ({num_wake_ups})"
        time.sleep(0.2)


@dataclass(frozen=True)
class Window:
    """What was measured between two samples."""

    tally: Tally
    before: Sample
    after: Sample
    supervisor_seconds: float

    @classmethod
    def measure(cls, drivers: Drivers, owner_url: str, *, seconds: float) -> Window:
        before, began = Sample.take(owner_url), drivers.look()
        time.sleep(seconds)
        tally, after = drivers.look(), Sample.take(owner_url)
        return cls(tally, before, after, tally.cpu_seconds - began.cpu_seconds)


def describe(num_workers: int, scaling: str, window: Window, *, step_seconds: float) -> str:
    tally, before, after = window.tally, window.before, window.after
    seconds = after.at - before.at
    steps = (after.num_steps - before.num_steps) / seconds
    cells = [
        str(num_workers),
        scaling,
        f"{tally.num_claimed / seconds:.1f}",
        percentiles(tally.claims_ms),
        percentiles(tally.beats_ms),
        percentiles(tally.records_ms),
        f"{steps:.0f} ({steps * step_seconds / (num_workers * SLOTS):.0%})",
        f"{(after.num_transactions - before.num_transactions) / seconds:.0f}",
        f"{(after.cpu_seconds - before.cpu_seconds) / seconds:.2f}",
        f"{window.supervisor_seconds / seconds:.2f}",
        str(after.num_lost),
    ]
    return f"| {' | '.join(cells)} |"


def percentiles(values: Sequence[float]) -> str:
    return f"{np.percentile(values, 50):.1f} / {np.percentile(values, 99):.1f}" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 50, 100, 200])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--step-seconds", type=float, default=5.0)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before. {machine()}\n$ {command()}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for num_workers in options.workers:
        with tempfile.TemporaryDirectory() as name, LocalServers(Path(name) / "servers") as servers:
            print(measure(servers.addresses, Path(name), num_workers=num_workers, options=options), flush=True)


if __name__ == "__main__":
    main()
