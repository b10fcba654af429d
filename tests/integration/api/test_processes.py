"""Several API processes on one port: they answer alike, stop together, and none is left over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from sqlalchemy import Engine

from core.domain.ids import IdKind, format_id
from core.services.api_keys import revoke_api_key
from local.ports import free_ports, is_free
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.jobs import start_job
from tests.factories.tenants import Tenant
from tests.integration.api.events import open_stream
from tests.processes import running_api
from tests.sessions import any_role_transaction
from tests.waiting import PATIENCE_SECONDS, ask_until, wait_until

REVOCATION_SECONDS = 5.0
YOUNG_SECONDS = 12.0  # well beyond five: the parent counts from a moment after the birth


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def group(database: Database, servers: ServerAddresses, port: int) -> Iterator[subprocess.Popen[bytes]]:
    with running_api(database.api_url, servers.storage, port=port, num_processes=2) as process:
        yield process


def children_of(group: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes that serve: the interpreter's own helper is none of them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(group.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return []


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def has_connection_from(process: psutil.Process, port: int) -> bool:
    return any(each.raddr and each.raddr.port == port for each in process.net_connections(kind="tcp"))


def test_all_stop_together_though_a_stream_is_open(
    group: subprocess.Popen[bytes], port: int, owner: Engine, tenant: Tenant
) -> None:
    children = children_of(group)
    assert len(children) == 2
    job_id = format_id(IdKind.JOB, start_job(owner, tenant).job_id)
    with open_stream(f"http://127.0.0.1:{port}", tenant.api_key, job_id) as events:
        next(events)
        group.terminate()
        with contextlib.suppress(httpx.TransportError):
            assert len(list(events)) <= 1
    assert group.wait() == 0
    assert all(map(is_gone, children))
    assert is_free(port)


def test_a_single_process_that_is_asked_to_stop_ends_in_good_order(
    database: Database, servers: ServerAddresses, port: int
) -> None:
    """By a status of 0, and not by the signal: what it runs at its end is run, and no orchestrator sees a failure."""
    for asked in (signal.SIGTERM, signal.SIGINT):
        with running_api(database.api_url, servers.storage, port=port) as process:
            process.send_signal(asked)
            assert process.wait() == 0


def test_one_that_died_is_replaced(group: subprocess.Popen[bytes], port: int) -> None:
    victim, other = children_of(group)
    wait_until(lambda: time.time() - victim.create_time() > YOUNG_SECONDS)
    victim.kill()
    wait_until(lambda: len(set(children_of(group)) - {victim}) == 2)
    assert other in children_of(group)
    assert httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False, timeout=PATIENCE_SECONDS).status_code == 200


def test_the_death_of_a_young_one_ends_all(group: subprocess.Popen[bytes], port: int) -> None:
    wait_until(lambda: all(time.time() - child.create_time() > YOUNG_SECONDS for child in children_of(group)))
    victim, other = children_of(group)
    victim.kill()

    def young_is_killed() -> bool:  # again and again: a busy machine may let one grow old before it is seen
        for young in set(children_of(group)) - {victim, other}:
            young.kill()
        return group.poll() is not None

    wait_until(young_is_killed, what="the end of all")
    assert group.wait() == 1
    assert is_gone(other)
    assert is_free(port)


def test_none_survives_the_parent(group: subprocess.Popen[bytes], port: int) -> None:
    children = children_of(group)
    os.kill(group.pid, signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, children)))
    wait_until(lambda: is_free(port))  # a process that is gone may have a moment left to close what it held


def test_a_revoked_key_is_refused_within_five_seconds_by_each(
    group: subprocess.Popen[bytes], port: int, owner: Engine, tenant: Tenant
) -> None:
    url, headers = f"http://127.0.0.1:{port}/v1/models", {"authorization": f"Bearer {tenant.api_key}"}
    with contextlib.ExitStack() as stack:
        clients: dict[int, httpx.Client] = {}

        def both_are_found() -> bool:  # a connection stays with the process that took it
            client = stack.enter_context(httpx.Client(trust_env=False, timeout=PATIENCE_SECONDS, headers=headers))
            answer = client.get(url)
            assert answer.status_code == 200
            own_port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
            clients.update((child.pid, client) for child in children_of(group) if has_connection_from(child, own_port))
            return len(clients) == 2

        wait_until(both_are_found)
        with any_role_transaction(owner) as session:
            revoke_api_key(session, tenant.id, key_id=tenant.key_id)
        ask_until(
            lambda: [client.get(url).status_code for client in clients.values()] == [401, 401],
            promised_seconds=REVOCATION_SECONDS,
        )
