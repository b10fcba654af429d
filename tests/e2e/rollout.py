"""A rolling update of the service under load, process by process. Its clients must notice nothing.

Processes do here what a Deployment does: the new one is started first, gets requests once it is ready, and only then
the old one is asked to end. In front of the APIs is the equivalent of a Service: an address whose new connections go to
ready processes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import openai
import psycopg
from openai import OpenAI

from core.db.migrate import RoleLogin, login_url
from local.ports import free_ports
from local.processes import ChildProcess, ProcessSpec
from local.servers import LocalServers
from local.stack import answers
from tests.e2e.lab import BASE_MODEL, ENDED
from tests.processes import storage_settings
from tests.waiting import PATIENCE_SECONDS, wait_until

T = TypeVar("T")
POOL = f"{BASE_MODEL}@none"
NUM_OPEN = 6
SETTINGS = {
    "ESPALIER_HEARTBEAT_SECONDS": "0.5",
    "ESPALIER_TRAINER_THREADS": "1",
    "ESPALIER_RESUME_STEPS": "5",
    "ESPALIER_GRACE_SECONDS": "60",
    "ESPALIER_BODY_SECONDS": "5",
    "ESPALIER_LEADER_LEASE_SECONDS": "2",
    "ESPALIER_REQUESTS_PER_MINUTE": "1000000",
}
LISTENING = """
select count(*) from pg_stat_activity where usename = 'espalier_schedule'
  and query in ('listen espalier_wake', 'listen "espalier_wake"')
"""
ROWS = b"\n".join(
    b'{"messages": [{"role": "user", "content": "Say %d."}, {"role": "assistant", "content": "It is %d."}]}' % (n, n)
    for n in range(12)
)


class Service:
    """One address in front of several ports. A connection goes to one of them in turn, for as long as it lives."""

    def __init__(self) -> None:
        self._ports: list[int] = []
        self._turn = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="service", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._listener = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._listener.sockets[0].getsockname()[1]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add(self, port: int) -> None:
        self._ports = [*self._ports, port]

    def remove(self, port: int) -> None:
        """Send no new connection there; those that are open stay."""
        self._ports = [each for each in self._ports if each != port]

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_SECONDS)

    async def _close(self) -> None:
        self._listener.close()
        links = asyncio.all_tasks() - {asyncio.current_task()}
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ports = self._ports
        port = ports[next(self._turn) % len(ports)]
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.gather(_pass_on(reader, upstream_writer), _pass_on(upstream_reader, writer))
        finally:
            writer.transport.abort()
            upstream_writer.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    writer.close()


@dataclass(frozen=True)
class Member:
    """One process of the service, and the port on which it serves if it is an API."""

    process: ChildProcess
    port: int | None = None


class Rollout:
    """Two APIs, two schedules and two workers on local servers, from a tree of sources; each can be replaced."""

    def __init__(self, servers: LocalServers, service: Service, directory: Path) -> None:
        self._servers, self._service, self._directory = servers, service, directory
        self._numbers = itertools.count()
        self._members: dict[str, list[Member]] = {"api": [], "schedule": [], "worker": []}
        self.owner_url = servers.addresses.postgres_url
        self.storage = servers.addresses.storage
        self.url = f"http://127.0.0.1:{service.port}/v1"

    def migrate(self, tree: Path, registry: Path) -> None:
        """Bring the database to the schema of a tree, as its own command does."""
        passwords = {f"ESPALIER_{role.upper()}_PASSWORD": self._password(role) for role in self._members}
        env = {"ESPALIER_REGISTRY": str(registry), **passwords}
        self._run(tree, "migrate", **env)

    def create_tenant(self, tree: Path, slug: str, *settings: str) -> str:
        """Add a tenant, with settings as `tenants set` takes them, and return its API key, by the commands of a tree."""
        key = self._run(tree, "tenants", "create", slug)
        if settings:
            self._run(tree, "tenants", "set", slug, *settings)
        return key

    def _run(self, tree: Path, *words: str, **env: str) -> str:
        env = {**os.environ, "ESPALIER_OWNER_DATABASE_URL": self.owner_url, **env}
        argv = [sys.executable, "-m", "cli", *words]
        return subprocess.run(argv, cwd=tree, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    def start(self, tree: Path) -> None:
        for kind in self._members:
            for _ in range(2):
                self.add(kind, tree)

    def replace_all(self, tree: Path) -> None:
        """Replace every process, one at a time: schedules, workers in the middle of a job, APIs."""
        for kind in ("schedule", "worker", "api"):
            for old in tuple(self._members[kind]):
                self.add(kind, tree)
                if kind == "worker":
                    self._wait_for_job(old)
                self.remove(kind, old)

    def stop(self) -> None:
        for kind, members in self._members.items():
            for member in tuple(members):
                self.remove(kind, member)

    def add(self, kind: str, tree: Path) -> Member:
        """Start a process of a kind from a tree, and wait until it is ready."""
        port = free_ports(1)[0] if kind == "api" else None
        name = f"{kind}-{next(self._numbers)}"
        spec = ProcessSpec(
            name,
            [sys.executable, "-m", kind],
            {**self._environment(kind), "ESPALIER_WORKER_NAME": name, "ESPALIER_API_PORT": str(port or 0)},
            stop_seconds=PATIENCE_SECONDS,
            cwd=tree,
        )
        member = Member(ChildProcess(spec, self._directory / "logs"), port)
        self._members[kind].append(member)
        member.process.wait_until(lambda: self._is_ready(kind, member), timeout_seconds=PATIENCE_SECONDS)
        if port is not None:
            self._service.add(port)
        return member

    def remove(self, kind: str, member: Member) -> None:
        """Send no new connection there, then ask it to end and wait."""
        if member.port is not None:
            self._service.remove(member.port)
        member.process.stop()
        self._members[kind].remove(member)

    def ask(self, question: str, *values: str) -> object:
        with psycopg.connect(self.owner_url) as connection:
            row = connection.execute(question, values).fetchone()
        return None if row is None else row[0]

    def _is_ready(self, kind: str, member: Member) -> bool:
        name = member.process.spec.name
        match kind:
            case "api":
                return answers(f"http://127.0.0.1:{member.port}")
            case "worker":
                is_warm = "select 1 from workers where split_part(name, ':', 1) = %s and pool is not null"
                return self.ask(is_warm, name) is not None
            case _:
                return self.ask(LISTENING) == len(self._members[kind])

    def _wait_for_job(self, worker: Member) -> None:
        has_job = "select 1 from attempts where outcome is null and split_part(worker_name, ':', 1) = %s limit 1"
        name = worker.process.spec.name
        wait_until(lambda: self.ask(has_job, name) is not None, what=f"a job of {name}")

    def _password(self, kind: str) -> str:
        return str(getattr(self._servers.secrets, kind))

    def _environment(self, kind: str) -> dict[str, str]:
        storage = self._servers.addresses.storage
        return {
            **SETTINGS,
            "ESPALIER_DATABASE_URL": login_url(self.owner_url, RoleLogin(f"espalier_{kind}", self._password(kind))),
            "ESPALIER_REDIS_URL": self._servers.addresses.redis_url,
            **storage_settings(storage),
            "ESPALIER_WORKER_POOLS": f'["{POOL}"]',
            "ESPALIER_CACHE_DIR": str(self._directory / "cache"),
        }


@dataclass
class Load:
    """A tenant who keeps some jobs unfinished, asks for them, follows one, and notes every error that reaches it.

    OpenAI's client sends a request again that met a connection's end or a 503, as any client of this API should.
    """

    client: OpenAI
    accepted: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_requests: int = 0

    def __post_init__(self) -> None:
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._submit, self._look, self._list)]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            wait_until(lambda: len(self.accepted) >= NUM_OPEN or bool(self.errors), what="a load of jobs")
            yield
        finally:
            self._is_over.set()
            for thread in self._threads:
                thread.join()

    def _submit(self) -> None:
        while not self._is_over.is_set():
            if len(self._unfinished()) < NUM_OPEN:
                self._ask(self._submit_one)
            self._is_over.wait(0.2)

    def _submit_one(self) -> None:
        file = self.client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        job = self.client.fine_tuning.jobs.create(
            model=BASE_MODEL,
            training_file=file.id,
            hyperparameters={"n_epochs": 12, "batch_size": 4},
            extra_headers={"Idempotency-Key": uuid.uuid4().hex},
        )
        self.accepted.append(job.id)

    def _look(self) -> None:
        while not self._is_over.is_set():
            for job_id in self.accepted[-NUM_OPEN:]:
                self._ask(partial(self.client.fine_tuning.jobs.retrieve, job_id))
            self._is_over.wait(0.05)

    def _list(self) -> None:
        while not self._is_over.is_set():
            for job_id in self.accepted[-1:]:
                self._ask(partial(self.client.fine_tuning.jobs.list_events, job_id, limit=5))
            self._is_over.wait(0.1)

    def _unfinished(self) -> list[str]:
        jobs = self._ask(lambda: self.client.fine_tuning.jobs.list(limit=50).data)
        return [job.id for job in jobs or () if job.status not in ENDED]

    def _ask(self, ask: Callable[[], T]) -> T | None:
        self.num_requests += 1
        try:
            return ask()
        except openai.OpenAIError as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            return None
