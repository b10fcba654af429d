"""The cost of every query after years of use: `python -m bench.years [--rounds N] [--data DIR] > bench/years.md`.

Real servers and one API process run on the rows of years.sql: 20,000 jobs, one of them with 300,000 steps, 1.2 million
events of its tenant and 700,000 later ones of others. Every list and look-up of the API is requested over HTTP. The
schedule's duties and the contract's checks run as the schedule and the owner run them. `--data` keeps the rows: another
run over the same directory adds no rows, and upgrades the schema.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
import yaml
from sqlalchemy import Engine

from core.db.migrate import RoleLogin, login_url
from core.db.session import ServiceSession, auditor_transaction, connect, operator_transaction, service_transaction
from core.domain.ids import IdKind, format_id
from core.domain.jobs import pool_name
from core.domain.leases import Lease
from core.domain.scheduling import FairnessTerms
from core.services import attempts, census, charges, claims, files, garbage, idempotency, operators, promises, purges
from core.services.oversight import PoolDemand, find_pool_demand
from local.servers import LocalServers
from local.stack import LocalStack

BASE = "acme-labs/tiny"
POOL = pool_name(BASE, None)
ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 10
LOOK_MS, METRICS_MS = 30.0, 100.0
PATIENCE_SECONDS = 10.0
SWEEP_AGE = dt.timedelta(days=1)


@dataclass(frozen=True)
class Clients:
    """Who asks over HTTP: the tenant whose job is long, and an operator."""

    tenant: httpx.Client
    operator: httpx.Client


@dataclass(frozen=True)
class Marks:
    """Rows that the lists are asked for, or from behind: `middle_*` lie deep."""

    job: str
    running_job: str
    queued_job: str
    middle_job: str
    middle_event: str
    middle_line: str
    middle_file: str
    middle_adapter: str
    middle_checkpoint: str
    last_audit: int
    model: str
    checkpoint_model: str
    file: str


@dataclass(frozen=True)
class Measured:
    what: str
    milliseconds: list[float]
    bound: float | None = None

    def as_row(self) -> str:
        ordered = sorted(self.milliseconds)
        p50, p99 = ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))]
        kept = "" if self.bound is None else f"{self.bound:.0f}{'' if p50 <= self.bound else ', **missed**'}"
        return f"| {self.what} | {len(ordered)} | {p50:.1f} | {p99:.1f} | {kept} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data_dir = options.data or Path(directory) / "data"
        with running_stack(data_dir) as (stack, servers):
            clients = prepare(stack)
            report(stack, servers, clients, find_marks(stack.owner_url), num_rounds=options.rounds)


@contextmanager
def running_stack(data_dir: Path) -> Iterator[tuple[LocalStack, LocalServers]]:
    entry = {
        "id": BASE,
        "source": {"kind": "path", "location": "/nowhere"},
        "target_modules": ["q_proj", "v_proj"],
        "max_seq_len": 256,
    }
    data_dir.mkdir(parents=True, exist_ok=True)
    registry = data_dir / "registry.yaml"
    registry.write_text(yaml.safe_dump({"base_models": [entry]}))
    env = {"ESPALIER_REQUESTS_PER_MINUTE": "1000000", "ESPALIER_API_PROCESSES": "1"}
    servers = LocalServers(data_dir)
    with LocalStack(data_dir, registry_path=registry, env=env, servers=servers) as stack:
        for name in ("worker", "schedule"):
            stack.process(name).stop()
        yield stack, servers


def prepare(stack: LocalStack) -> Clients:
    """Return who asks, and plant the rows where they are not there yet."""
    tenant = make_client(stack, stack.create_tenant("years"))
    engine = connect(stack.owner_url)
    with operator_transaction(engine, actor="bench") as session:
        operator = make_client(stack, str(operators.issue_operator_key(session, name="ada")))
    engine.dispose()
    with psycopg.connect(stack.owner_url, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        if connection.execute("select from jobs where total_steps = 300000").fetchone() is None:
            sql = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
            connection.execute(sql, {"seed": submit_job(tenant)})
            connection.execute("vacuum")
        connection.execute("update jobs set lease_until = now() + interval '1 day' where status = 'running'")
        connection.execute("update workers set alive_until = now() + interval '1 day'")
        connection.execute("checkpoint")
    return Clients(tenant, operator)


def make_client(stack: LocalStack, api_key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {api_key}"}
    return httpx.Client(base_url=stack.api_url, headers=headers, trust_env=False, timeout=900)


def submit_job(client: httpx.Client) -> uuid.UUID:
    form = {"files": {"file": ("rows.jsonl", ROWS)}, "data": {"purpose": "fine-tune"}}
    file_id = client.post("/v1/files", **form).raise_for_status().json()["id"]  # type: ignore[arg-type]
    answer = client.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file_id}).raise_for_status()
    return uuid.UUID(answer.json()["id"].removeprefix(IdKind.JOB))


def find_marks(owner_url: str) -> Marks:
    with psycopg.connect(owner_url) as connection:

        def one(statement: str) -> str:
            row = connection.execute(f"{statement} limit 1".encode()).fetchone()
            assert row is not None
            return format_id(kind, row[0]) if isinstance(row[0], uuid.UUID) else row[0]

        kind = IdKind.JOB
        long = "(select id from jobs where total_steps = 300000)"
        own = "tenant_id = (select id from tenants where slug = 'years')"
        jobs = {
            "job": one(f"select id from jobs where id = {long}"),
            "running_job": one(f"select id from jobs where {own} and status = 'running'"),
            "queued_job": one(f"select id from jobs where {own} and status = 'queued'"),
            "middle_job": one(f"select id from jobs where {own} order by id offset 1000"),
        }
        kind = IdKind.EVENT
        event = one(f"select id from events where job_id = {long} order by number offset 1000")
        kind = IdKind.LOG_LINE
        line = one(f"select id from log_lines where job_id = {long} order by number offset 50000")
        kind = IdKind.FILE
        file = one(f"select id from files where {own} and deleted_at is null order by id offset 1000")
        kind = IdKind.ADAPTER
        adapter = one(f"select id from adapters where {own} order by id offset 1000")
        kind = IdKind.CHECKPOINT
        checkpoint = one(f"select id from checkpoints where job_id = {long} order by id offset 50")
        return Marks(
            **jobs,
            middle_event=event,
            middle_line=line,
            middle_file=file,
            middle_adapter=adapter,
            middle_checkpoint=checkpoint,
            last_audit=int(one("select number from audit_entries where number > 1000 order by number")),
            model=one(f"select name from adapters where job_id = {long}"),
            checkpoint_model=one(f"select model_name from checkpoints where job_id = {long} order by step desc"),
            file=file,
        )


def tenant_looks(marks: Marks) -> dict[str, str]:
    jobs, job = "/v1/fine_tuning/jobs", f"/v1/fine_tuning/jobs/{marks.job}"
    return {
        "nothing (/livez), to compare with": "/livez",
        "jobs, newest": jobs,
        "jobs, newest 100": f"{jobs}?limit=100",
        "jobs, deep": f"{jobs}?after={marks.middle_job}",
        "jobs with a metadata pair": f"{jobs}?metadata[project]=p3",
        "jobs with a pair that none has": f"{jobs}?metadata[project]=none",
        "jobs without metadata": f"{jobs}?metadata=null",
        "a job": job,
        "a running job, with its estimate": f"{jobs}/{marks.running_job}",
        "explain, queued": f"{jobs}/{marks.queued_job}/explain",
        "explain, running": f"{jobs}/{marks.running_job}/explain",
        "events, newest": f"{job}/events",
        "events, newest 100": f"{job}/events?limit=100",
        "events, deep": f"{job}/events?after={marks.middle_event}",
        "events of a queued job": f"{jobs}/{marks.queued_job}/events",
        "checkpoints": f"{job}/checkpoints",
        "checkpoints, deep": f"{job}/checkpoints?after={marks.middle_checkpoint}",
        "log lines": f"{job}/logs",
        "log lines, deep": f"{job}/logs?after={marks.middle_line}",
        "log lines of an attempt without any": f"{job}/logs?attempt=2",
        "files": "/v1/files?limit=20",
        "files, deep": f"/v1/files?limit=20&after={marks.middle_file}",
        "files, of a purpose": "/v1/files?limit=20&purpose=fine-tune",
        "files, oldest first": "/v1/files?limit=20&order=asc",
        "a file": f"/v1/files/{marks.file}",
        "adapters": "/v1/adapters",
        "adapters, deep": f"/v1/adapters?after={marks.middle_adapter}",
        "models (the newest 1,000)": "/v1/models",
        "a model": f"/v1/models/{marks.model}",
        "a checkpoint by its name": f"/v1/models/{marks.checkpoint_model}",
        "permissions of a checkpoint": f"/v1/fine_tuning/checkpoints/{marks.checkpoint_model}/permissions",
        "API keys": "/v1/api_keys",
    }


def metrics_looks(marks: Marks) -> dict[str, str]:
    job = f"/v1/fine_tuning/jobs/{marks.job}/metrics"
    return {
        "metrics of 300,000 steps": job,
        "metrics, 3,000 points": f"{job}?points=3000",
        "metrics, 3 points": f"{job}?points=3",
        "metrics, steps 100,001 to 200,000": f"{job}?from_step=100001&to_step=200000",
        "metrics, steps 1,001 to 299,002": f"{job}?from_step=1001&to_step=299002",
        "metrics, steps 150,001 to 150,500": f"{job}?from_step=150001&to_step=150500",
    }


def operator_looks(marks: Marks) -> dict[str, str]:
    year = (dt.datetime.now(dt.UTC).date() - dt.timedelta(days=365)).isoformat()
    return {
        "operator: jobs": "/admin/jobs",
        "operator: jobs, deep": f"/admin/jobs?after={marks.middle_job}",
        "operator: failed jobs": "/admin/jobs?status=failed",
        "operator: failed jobs of a pool and tenant": f"/admin/jobs?status=failed&pool={POOL}&tenant=years",
        "operator: tenants": "/admin/tenants",
        "operator: API keys of a tenant": "/admin/tenants/years/api_keys",
        "operator: workers": "/admin/workers",
        "operator: pools": "/admin/pools",
        "operator: a pool's demand": f"/admin/pools/{POOL}/demand",
        "operator: base models": "/admin/base_models",
        "operator: audit": "/admin/audit",
        "operator: audit, deep": f"/admin/audit?after={marks.last_audit}",
        "operator: audit of a tenant": "/admin/audit?tenant=years",
        "operator: usage of this month by tenant": "/admin/usage",
        "operator: usage of a year by tenant": f"/admin/usage?from={year}",
        "operator: usage of a year by day": f"/admin/usage?from={year}&group_by=day",
    }


def duties(schedule: Engine, worker: Engine, owner: Engine) -> dict[str, Callable[[], object]]:
    def in_transaction(engine: Engine, ask: Callable[[ServiceSession], object]) -> Callable[[], object]:
        def do() -> object:
            with service_transaction(engine) as session:
                return ask(session)

        return do

    asked: dict[str, Callable[[ServiceSession], object]] = {
        "schedule: which pools to wake": claims.claimable_pools,
        "schedule: newcomers": charges.list_newcomers,
        "schedule: expired leases": attempts.expire_leases,
        "schedule: expired files": files.expire_files,
        "schedule: expired idempotency keys": idempotency.forget_expired_keys,
        "schedule: what to purge": purges.find_purges,
        "schedule: jobs to sweep": lambda session: garbage.find_unswept_jobs(session, min_age=SWEEP_AGE),
        "schedule: usage to settle": lambda session: garbage.settle_usage(session, min_age=dt.timedelta(hours=1)),
        "schedule: census, for Prometheus": census.take_census,
    }
    return {name: in_transaction(schedule, ask) for name, ask in asked.items()} | {
        "worker: a claim": lambda: claim_and_fail(worker),
        "scaler: a pool's demand": lambda: ask_demand(owner),
    }


def ask_demand(owner: Engine) -> PoolDemand:
    with operator_transaction(owner, actor="bench") as session:
        return find_pool_demand(session, POOL)


def claim_and_fail(worker: Engine) -> None:
    """Claim a job and give it back, so that the next claim finds one too."""
    with service_transaction(worker) as session:
        job = claims.claim_job(session, POOL, worker_name="bench", lease_seconds=60)
    assert job is not None
    assert job.lease_token is not None
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, Lease(job.id, job.tenant_id, job.lease_token))


def measure(what: str, ask: Callable[[], object], *, num_rounds: int, bound: float | None = None) -> Measured:
    """Ask so many times, or for as long as there is patience, after twice that do not count."""
    times = []
    ends_at = time.monotonic() + PATIENCE_SECONDS
    for number in range(num_rounds + 2):
        begun = time.perf_counter()
        ask()
        if number >= 2 or time.monotonic() > ends_at:
            times.append((time.perf_counter() - begun) * 1000)
        if times and time.monotonic() > ends_at:
            break
    return Measured(what, times, bound)


def asking(client: httpx.Client, path: str) -> Callable[[], object]:
    return lambda: client.get(path).raise_for_status()


def report(stack: LocalStack, servers: LocalServers, clients: Clients, marks: Marks, *, num_rounds: int) -> None:
    print(f"# Years of rows\n\n`python -m bench.years --rounds {num_rounds}`, {os.cpu_count()} cores, load ", end="")
    print(f"{os.getloadavg()[0]:.1f} before; API, database and who asks share them.\n")
    print("| what | times | p50, ms | p99, ms | bound |\n|---|---|---|---|---|")
    for looks, client, bound in (
        (tenant_looks(marks), clients.tenant, LOOK_MS),
        (operator_looks(marks), clients.operator, LOOK_MS),
        (metrics_looks(marks), clients.tenant, METRICS_MS),
    ):
        for what, path in looks.items():
            print(measure(what, asking(client, path), num_rounds=num_rounds, bound=bound).as_row(), flush=True)
    url, passwords = stack.owner_url, servers.secrets
    schedule = connect(login_url(url, RoleLogin("espalier_schedule", passwords.schedule)))
    worker = connect(login_url(url, RoleLogin("espalier_worker", passwords.worker)))
    owner = connect(url)
    for what, ask in duties(schedule, worker, owner).items():
        print(measure(what, ask, num_rounds=num_rounds).as_row(), flush=True)
    report_contract(owner)
    report_stream(stack, clients.tenant, marks)
    for engine in (schedule, worker, owner):
        engine.dispose()


def report_contract(owner: Engine) -> None:
    begun = time.perf_counter()
    with auditor_transaction(owner) as session:
        findings = promises.check_rows(session, FairnessTerms())
    broken = sum(finding.num_broken for finding in findings)
    print(f"\ncheck-contract, of rows: {time.perf_counter() - begun:.2f} s, {broken} broken.", flush=True)


def report_stream(stack: LocalStack, client: httpx.Client, marks: Marks) -> None:
    """Read the whole stream of the long job, and look at the API's memory meanwhile; beside it, ask for its status."""
    pid = stack.process("api").pid
    before = resident_mib(pid)
    greatest = before
    beside: list[float] = []
    is_over = threading.Event()
    status = make_beside(client)

    def look() -> None:
        nonlocal greatest
        while not is_over.wait(0.1):
            greatest = max(greatest, resident_mib(pid))
            begun = time.perf_counter()
            status.get(f"/v1/fine_tuning/jobs/{marks.job}").raise_for_status()
            beside.append((time.perf_counter() - begun) * 1000)

    looking = threading.Thread(target=look)
    looking.start()
    begun = time.perf_counter()
    num_events = 0
    tail = b""
    with client.stream("GET", f"/v1/fine_tuning/jobs/{marks.job}/stream") as answer:
        for chunk in answer.iter_raw():
            num_events += (tail + chunk).count(b"\nid: ") - tail.count(b"\nid: ")
            tail = chunk[-5:]
    seconds = time.perf_counter() - begun
    is_over.set()
    looking.join()
    print(f"\nThe whole stream: {num_events:,} events in {seconds:.1f} s; the API went from {before:.0f} to ", end="")
    print(f"{greatest:.0f} MiB. A job's status beside it: {Measured('', beside).as_row()}", flush=True)


def make_beside(client: httpx.Client) -> httpx.Client:
    return httpx.Client(base_url=client.base_url, headers=client.headers, trust_env=False, timeout=60)


def resident_mib(pid: int) -> float:
    """Return the memory of a process and its descendants."""
    total, pending = 0, [pid]
    while pending:
        process = Path(f"/proc/{pending.pop()}")
        total += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        pending += [int(each) for each in (process / f"task/{process.name}/children").read_text().split()]
    return total / 2**20


if __name__ == "__main__":
    main()
