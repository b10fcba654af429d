"""Does a claim take longer when more jobs are queued? Measures `claim_job` with its commit on databases of three sizes.

    python -m bench.claim [--claims 300] > bench/claim.md

The sizes take turns claim by claim, so that other load on the machine affects all of them alike; the ratios are the
result. Every claimed job is ended at once, outside the measurement, so that running jobs do not accumulate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy import Engine

from core.db.migrate import RoleLogin, login_url
from core.db.session import connect, service_transaction
from core.domain.bases import BaseModelEntry, BaseModelSource, Registry
from core.domain.failures import Failure
from core.domain.jobs import pool_name
from core.domain.leases import Lease
from core.services import attempts, claims
from local.servers import LocalServers
from local.stack import prepare_database

BASE = "acme-labs/tiny"
POOL = pool_name(BASE, None)
SIZES = ((1_000, 10), (100_000, 300), (1_000_000, 1_000))
LOGIN = RoleLogin("espalier_worker", "bench")
NUM_WARMUPS = 20
FILL = """
insert into tenants (id, slug, name, max_running, usage, usage_at)
    select uuidv7(), 't' || n, 't' || n, 100, random() * 1e5, now() - random() * interval '1 day'
    from generate_series(1, %(tenants)s) n;
insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status)
    select uuidv7(), id, 'a', 'fine-tune', 1, repeat('0', 64), 'k', 4, 'processed' from tenants;
alter table jobs disable trigger user;
insert into jobs (id, tenant_id, base_model_id, pool, training_file_id, spec, total_steps, status, priority)
    select uuidv7(), f.tenant_id, %(base)s, %(pool)s, f.id, '{}', 10, 'queued', n %% 3
    from generate_series(1, %(rows)s / %(tenants)s) n, files f;
alter table jobs enable trigger user;
insert into queues (tenant_id, pool, num_queued, rank)
    select t.id, %(pool)s, %(rows)s / %(tenants)s, share_rank(t.usage, t.usage_at, t.weight) from tenants t;
analyze;
"""


@dataclass
class Queue:
    """One database with so many queued jobs of so many tenants."""

    num_rows: int
    num_tenants: int
    engine: Engine
    milliseconds: list[float] = field(default_factory=list)

    def claim(self) -> float:
        """Claim one job and return how long that took, in milliseconds."""
        begun = time.perf_counter()
        with service_transaction(self.engine) as session:
            job = claims.claim_job(session, POOL, worker_name="bench", lease_seconds=60)
        taken = (time.perf_counter() - begun) * 1000
        assert job is not None
        assert job.lease_token is not None
        lease = Lease(job.id, job.tenant_id, job.lease_token)
        with service_transaction(self.engine) as session:
            attempts.fail_attempt(session, lease, failure=Failure(code="bench", message="Over."), is_job_fault=True)
        return taken


def make_queue(owner_url: str, num_rows: int, num_tenants: int) -> Queue:
    name = f"bench_{num_rows}"
    with psycopg.connect(owner_url, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    url = owner_url.rpartition("/")[0] + f"/{name}"
    entry = BaseModelEntry(
        id=BASE, source=BaseModelSource(kind="path", location="/"), target_modules=("q_proj",), max_seq_len=64
    )
    prepare_database(url, Registry(base_models=(entry,)), logins=(LOGIN,))
    values = {"rows": num_rows, "tenants": num_tenants, "base": BASE, "pool": POOL}
    with psycopg.connect(url, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        connection.execute(FILL, values)
        connection.execute("vacuum analyze")
    return Queue(num_rows, num_tenants, connect(login_url(url, LOGIN)))


def report(queues: list[Queue], num_claims: int) -> None:
    print(
        f"# The latency of a claim\n\n`python -m bench.claim --claims {num_claims}`, {os.cpu_count()} cores, PostgreSQL"
    )
    print("with fsync on the same machine. A claim is six statements and a commit. Milliseconds, and the ratio to the")
    print("smallest queue.\n")
    print(
        "| queued jobs | tenants | min | median | p99 | min ratio | median ratio | p99 ratio |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    smallest = None
    for queue in queues:
        percentiles = statistics.quantiles(queue.milliseconds, n=100)
        numbers = (min(queue.milliseconds), percentiles[49], percentiles[98])
        smallest = smallest or numbers
        ratios = (number / first for number, first in zip(numbers, smallest, strict=True))
        cells = [
            f"{queue.num_rows:,}",
            f"{queue.num_tenants:,}",
            *(f"{n:.2f}" for n in numbers),
            *(f"{r:.2f}" for r in ratios),
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claims", type=int, default=300)
    num_claims = parser.parse_args().claims
    with tempfile.TemporaryDirectory() as directory, LocalServers(Path(directory)) as servers:
        queues = [make_queue(servers.addresses.postgres_url, *size) for size in SIZES]
        for number in range(NUM_WARMUPS + num_claims):
            for queue in queues:
                taken = queue.claim()
                if number >= NUM_WARMUPS:
                    queue.milliseconds.append(taken)
        report(queues, num_claims)
        for queue in queues:
            queue.engine.dispose()


if __name__ == "__main__":
    main()
