"""The soak: the real service with two workers under a seeded nemesis, and then a check of the promises.

    python -m tests.e2e.chaos --minutes 5 --seed 1

Tenants submit jobs all the time, and repeat each submission until it is accepted. When the time is up the faults stop.
Then every accepted job must end, and nothing may be left behind. Exit code 1 when any promise is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import psycopg
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from cli.commands.promises import as_table, run_checks
from core.services.promises import Finding
from tests.e2e.lab import BASE_MODEL, ENDED, Lab, running_lab
from tests.e2e.nemesis import LEASE_SECONDS, Fleet, Nemesis
from tests.factories.tiny_bases import write_tiny_base

NUM_OPEN = 8
TENANTS = ("acme", "beta", "gamma")
DRAIN_SECONDS = 600.0
HASTE: dict[str, Any] = {
    "ESPALIER_LEASE_SECONDS": str(LEASE_SECONDS),
    "ESPALIER_GRACE_SECONDS": "8",
    "ESPALIER_STALL_SECONDS": "8",
}
ROWS = b"\n".join(
    b'{"messages": [{"role": "user", "content": "Say %d."}, {"role": "assistant", "content": "It is %d."}]}' % (n, n)
    for n in range(12)
)


@dataclass(eq=False)
class Tenants(threading.Thread):
    """Submits jobs so that some are always unfinished, and remembers every one that was accepted."""

    lab: Lab
    seed: int
    accepted: list[str] = field(default_factory=list)
    num_tries: int = 0
    refusals: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__(name="tenants", daemon=True)
        self.is_over = threading.Event()
        self._random = random.Random(self.seed)
        url = f"{self.lab.stack.api_url}/v1"
        keys = [self.lab.stack.create_tenant(slug) for slug in TENANTS]
        self._clients = [OpenAI(base_url=url, api_key=key, max_retries=0, timeout=10) for key in keys]

    def run(self) -> None:
        for client in itertools.cycle(self._clients):
            while not self.is_over.is_set() and len(self.open_jobs()) >= NUM_OPEN:
                self.is_over.wait(0.3)
            if self.is_over.is_set():
                return
            self._submit(client)

    def open_jobs(self) -> list[str]:
        return [job_id for job_id, status in statuses(self.lab).items() if status not in ENDED]

    def _submit(self, client: OpenAI) -> None:
        file_id = self._insist(lambda: client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id)
        if file_id is None:
            return
        name, n_epochs = uuid.uuid4().hex, self._random.randint(1, 6)
        job_id = self._insist(
            lambda: (
                client.fine_tuning.jobs.create(
                    model=BASE_MODEL,
                    training_file=file_id,
                    hyperparameters={"n_epochs": n_epochs, "batch_size": 4},
                    metadata={"submission": name},
                    extra_headers={"Idempotency-Key": name},
                ).id
            )
        )
        if job_id is not None:
            self.accepted.append(job_id)

    def _insist(self, ask: Callable[[], str]) -> str | None:
        """Ask until it is answered. What is answered by a refusal of the request itself is a finding."""
        while not self.is_over.is_set():
            self.num_tries += 1
            try:
                return ask()
            except (openai.APIConnectionError, openai.InternalServerError):
                self.is_over.wait(0.2)
            except openai.APIStatusError as error:
                self.refusals.add(f"{error.status_code} {error.body}")
                return None
        return None


def statuses(lab: Lab) -> dict[str, str]:
    """Return every job's status, from the database itself; nothing while it is away."""
    try:
        with psycopg.connect(lab.servers.direct.postgres_url, connect_timeout=5) as connection:
            rows = connection.execute("select id, status from jobs").fetchall()
    except psycopg.OperationalError:
        return {}
    return {f"ftjob-{job_id.hex}": status for job_id, status in rows}


def soak(fleet: Fleet, nemesis: Nemesis, tenants: Tenants, *, seconds: float, console: Console) -> None:
    tenants.start()
    pace = random.Random(tenants.seed + 1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):  # the nemesis' own request met the API's death
            nemesis.strike()
        fleet.revive()
        if nemesis.counts.total() % 100 == 0:
            console.print(f"{nemesis.counts.total()} faults, {len(tenants.accepted)} jobs accepted")
        time.sleep(pace.uniform(0.0, 0.4))
    tenants.is_over.set()
    tenants.join()


def drain(lab: Lab, fleet: Fleet, tenants: Tenants) -> dict[str, str]:
    """Let every job come to its end, and return how those accepted ended; "lost" and "stuck" are what must not be."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < deadline:
        found = statuses(lab)
        fleet.revive()
        if found and all(status in ENDED for status in found.values()):
            break
        for job_id in (job_id for job_id, status in found.items() if status == "paused"):
            lab.rows.sql("update jobs set status = 'queued' where id = %s and status = 'paused' returning id", job_id)
        time.sleep(0.5)
    ends = {job_id: found.get(job_id, "lost") for job_id in tenants.accepted}
    return {job_id: status if status in (*ENDED, "lost") else "stuck" for job_id, status in ends.items()}


def find_failures(lab: Lab) -> dict[tuple[str, bool], int]:
    """Count the failed jobs by their code, and by whether all their attempts were spent: no fault here is a job's own."""
    query = (
        "select error->>'code', attempt_count >= max_attempts, count(*) from jobs where status = 'failed' group by 1, 2"
    )
    with psycopg.connect(lab.servers.direct.postgres_url) as connection:
        return {(code, is_spent): count for code, is_spent, count in connection.execute(query)}


def find_leftovers(directory: Path, temporary: Path) -> dict[str, list[str]]:
    """Return processes that still run for this soak, and files that it has left in the temporary directory."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = str(directory) in " ".join([*process.cmdline(), *process.environ().values()])
            if is_ours and process.pid != os.getpid():
                processes.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    return {"processes": processes, "temporary files": [path.name for path in temporary.iterdir()]}


def report(
    console: Console,
    *,
    nemesis: Nemesis,
    fleet: Fleet,
    tenants: Tenants,
    ends: dict[str, str],
    failures: dict[tuple[str, bool], int],
    findings: tuple[Finding, ...],
    leftovers: dict[str, list[str]],
) -> bool:
    faults = Table("kind of fault", "hits", box=None)
    for name, count in sorted(nemesis.counts.items()):
        faults.add_row(name, str(count))
    console.print(faults)
    kinds = sum(count > 0 for count in nemesis.counts.values())
    console.print(f"{nemesis.counts.total()} faults of {kinds} kinds; {fleet.num_restarts} processes came back")
    how = {status: list(ends.values()).count(status) for status in (*ENDED, "lost", "stuck")}
    console.print(f"{len(ends)} jobs accepted in {tenants.num_tries} requests: {how}")
    for (code, is_spent), count in sorted(failures.items()):
        console.print(f"{count} failed: {code}{'' if is_spent else ' [red]with attempts left[/]'}")
    console.print(as_table(findings))
    for refusal in sorted(tenants.refusals):
        console.print(f"[red]refused: {refusal}[/]")
    for kind, left in leftovers.items():
        console.print(f"{len(left)} leaked {kind} {left[:5]}")
    num_bad = how["lost"] + how["stuck"] + len(tenants.refusals) + sum(finding.num_broken for finding in findings)
    num_bad += sum(count for (_, is_spent), count in failures.items() if not is_spent)
    return num_bad + sum(map(len, leftovers.values())) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    console.print(f"seed {options.seed}, {options.minutes:g} minutes")
    with tempfile.TemporaryDirectory(prefix="espalier-chaos-") as name:
        directory, temporary = Path(name), Path(name) / "tmp"
        temporary.mkdir()
        base_dir = directory / "base"
        base_dir.mkdir()
        with running_lab(write_tiny_base(base_dir), directory, TMPDIR=str(temporary), **HASTE) as lab:
            fleet = Fleet(lab)
            try:
                tenants = Tenants(lab, options.seed)
                nemesis = Nemesis(lab, fleet, seed=options.seed, job_ids=tenants.open_jobs)
                soak(fleet, nemesis, tenants, seconds=options.minutes * 60, console=console)
                ends = drain(lab, fleet, tenants)
                failures = find_failures(lab)
            finally:
                fleet.close()
            direct = lab.servers.direct
            findings = run_checks(direct.postgres_url, direct.storage, is_deep=True)
        is_kept = report(
            console,
            nemesis=nemesis,
            fleet=fleet,
            tenants=tenants,
            ends=ends,
            failures=failures,
            findings=findings,
            leftovers=find_leftovers(directory, temporary),
        )
    console.print(
        f"[{'green' if is_kept else 'red'}]the contract is {'kept' if is_kept else 'BROKEN'}[/], seed {options.seed}"
    )
    raise SystemExit(0 if is_kept else 1)


if __name__ == "__main__":
    main()
