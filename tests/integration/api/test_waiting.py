"""A tenant's waiting requests delay no other tenant, and hold no transaction open."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from sqlalchemy import Engine, text

from api.admission import DOWNLOADS, LONG_BODIES, MULTIPART_BODIES, PREVIEWS, Gate
from api.routing import SHARE_OF_TENANT
from core.db.session import service_transaction, tenant_transaction
from core.domain.ids import IdKind, parse_id
from core.storage import S3ObjectStore
from local.ports import free_ports
from local.servers import ServerAddresses
from tests.bundles import letters_bundle
from tests.databases import Database, num_waiting
from tests.factories.bases import BASE_MODEL, publish_tokenizer
from tests.factories.tenants import Tenant, add_tenant
from tests.faults import FaultProxy, Hang, port_of
from tests.integration.api.planting import plant
from tests.processes import running_api
from tests.waiting import wait_until

ROW = b'{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}'
NUM_ASKED = 45
Ask = Callable[[httpx.Client], httpx.Response]
Sockets = list[socket.socket]


@pytest.fixture(scope="module")
def proxy(servers: ServerAddresses) -> Iterator[FaultProxy]:
    with FaultProxy(port_of(f"http://{servers.storage.endpoint}")) as made:
        yield made


@pytest.fixture(scope="module")
def api_url(database: Database, servers: ServerAddresses, proxy: FaultProxy) -> Iterator[str]:
    """An API whose object store stands behind a proxy that can hang."""
    (port,) = free_ports(1)
    with running_api(database.api_url, replace(servers.storage, endpoint=f"127.0.0.1:{proxy.port}"), port=port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def http(api_url: str, tenant: Tenant) -> Iterator[httpx.Client]:
    with client_of(api_url, tenant) as made:
        yield made


@pytest.fixture
def neighbour(api_url: str, other_tenant: Tenant) -> Iterator[httpx.Client]:
    with client_of(api_url, other_tenant) as made:
        yield made


def client_of(api_url: str, tenant: Tenant) -> httpx.Client:
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(base_url=f"{api_url}/v1", headers=headers, trust_env=False, timeout=120, limits=limits)


@pytest.fixture
def file_id(http: httpx.Client) -> str:
    form = {"files": {"file": ("a.jsonl", ROW)}, "data": {"purpose": "fine-tune"}}
    return str(http.post("/files", **form).raise_for_status().json()["id"])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Begun:
    """An upload whose parts are there."""

    id: str
    part_id: str

    def complete(self, http: httpx.Client) -> httpx.Response:
        return http.post(f"/uploads/{self.id}/complete", json={"part_ids": [self.part_id]})


@pytest.fixture
def begun(http: httpx.Client) -> Begun:
    body = {"bytes": len(ROW), "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    upload_id = http.post("/uploads", json=body).raise_for_status().json()["id"]
    part = http.post(f"/uploads/{upload_id}/parts", files={"data": ROW}).raise_for_status().json()
    return Begun(upload_id, part["id"])


def statuses_of(asked: list[Future[httpx.Response]]) -> list[int]:
    return [each.result().status_code for each in asked if each.done()]


def idle_transactions(database: Database) -> int:
    with psycopg.connect(database.superuser_url) as connection:
        found = connection.execute(
            "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in trans%'"
        )
        return int(found.fetchone()[0])  # type: ignore[index]


def check_nobody_is_held_up(
    ask: Ask, http: httpx.Client, neighbour: httpx.Client, proxy: FaultProxy, database: Database, *, num_held: int
) -> list[httpx.Response]:
    """Ask many times while the store hangs, see others served meanwhile, and return the answers once it goes on."""
    with ThreadPoolExecutor(NUM_ASKED) as pool:
        with proxy.during(Hang()):
            asked = [pool.submit(ask, http) for _ in range(NUM_ASKED)]
            wait_until(lambda: len(statuses_of(asked)) == NUM_ASKED - num_held)
            for _ in range(20):
                assert neighbour.get("/fine_tuning/jobs").status_code == 200
                assert http.get("/fine_tuning/jobs").status_code == 200
            assert len(statuses_of(asked)) == NUM_ASKED - num_held, "they still wait, and nobody else does"
            wait_until(lambda: idle_transactions(database) == 0)
        return [each.result() for each in asked]


@pytest.mark.parametrize("kind", ["content", "archive", "preview"])
def test_a_store_that_hangs_holds_up_who_asked_for_it_and_nobody_else(
    kind: str,
    http: httpx.Client,
    neighbour: httpx.Client,
    proxy: FaultProxy,
    database: Database,
    owner: Engine,
    api: Engine,
    tenant: Tenant,
    servers: ServerAddresses,
    file_id: str,
) -> None:
    publish_tokenizer(owner, servers, letters_bundle().model_dump_json(), sha256="1" * 64)
    adapter_id = plant(owner, api, S3ObjectStore(servers.storage), tenant).adapter if kind == "archive" else ""
    asks: dict[str, tuple[Gate, Ask]] = {
        "content": (DOWNLOADS, lambda http: http.get(f"/files/{file_id}/content")),
        "archive": (DOWNLOADS, lambda http: http.get(f"/adapters/{adapter_id}/download?archive=tar")),
        "preview": (PREVIEWS, lambda http: http.post(f"/files/{file_id}/preview", json={"model": BASE_MODEL})),
    }
    gate, ask = asks[kind]
    answers = check_nobody_is_held_up(ask, http, neighbour, proxy, database, num_held=gate.of_tenant)
    refused = [each for each in answers if each.status_code == 429]
    assert len(refused) == NUM_ASKED - gate.of_tenant
    assert {each.json()["error"]["code"] for each in refused} == {f"too_many_{gate.name}"}
    assert all("retry-after" in each.headers for each in refused)
    assert [each.status_code for each in answers if each not in refused] == [200] * gate.of_tenant


def test_an_upload_is_completed_once_however_often_it_is_asked_for(
    http: httpx.Client, neighbour: httpx.Client, proxy: FaultProxy, database: Database, begun: Begun
) -> None:
    answers = check_nobody_is_held_up(begun.complete, http, neighbour, proxy, database, num_held=1)
    codes = [each.json().get("error", {}).get("code") for each in answers]
    assert codes.count(None) == 1
    assert set(codes) - {None} == {"upload_completing", "too_many_completions"}
    busy = next(each for each in answers if each.status_code == 409)
    assert (busy.headers["x-should-retry"], busy.headers["retry-after"]) == ("true", "5")
    (done,) = [each.json() for each in answers if each.is_success]
    assert begun.complete(http).json()["file"]["id"] == done["file"]["id"]
    assert len(http.get("/files").json()["data"]) == 1


def test_uploads_that_the_store_does_not_take_hold_up_nobody_else(
    http: httpx.Client, neighbour: httpx.Client, proxy: FaultProxy, database: Database
) -> None:
    form = {"files": {"file": ("a.jsonl", ROW)}, "data": {"purpose": "fine-tune"}}
    answers = check_nobody_is_held_up(
        lambda http: http.post("/files", **form),  # type: ignore[arg-type]
        http,
        neighbour,
        proxy,
        database,
        num_held=MULTIPART_BODIES.of_tenant,
    )
    assert (
        sorted(each.status_code for each in answers)[: MULTIPART_BODIES.of_tenant] == [200] * MULTIPART_BODIES.of_tenant
    )


@contextmanager
def asking(api_url: str, tenant: Tenant, count: int, *, sent: bytes, num_bytes: int = 100_000) -> Iterator[Sockets]:
    """Hold requests with a body of so many bytes, of which some have been sent, or none."""
    address = urlsplit(api_url)
    head = f"POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {tenant.api_key}\r\n".encode()
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % num_bytes
    with ExitStack() as stack:
        held = []
        for _ in range(count):
            held.append(stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=60)))
            held[-1].sendall(head + sent)
        yield held


def answered(held: Sockets) -> Sockets:
    return select.select(held, [], [], 0)[0]


@pytest.mark.parametrize("sent", [b"{", b""], ids=["begun", "not begun"])
def test_long_bodies_of_one_tenant_leave_places_to_others(
    api_url: str, http: httpx.Client, neighbour: httpx.Client, tenant: Tenant, sent: bytes
) -> None:
    with asking(api_url, tenant, LONG_BODIES.of_tenant + 3, sent=sent) as held:
        wait_until(lambda: len(answered(held)) == 3)
        for each in answered(held):
            answer = each.recv(65536)
            assert answer.startswith(b"HTTP/1.1 429")
            assert b"retry-after" in answer
            assert b'"too_many_long_bodies"' in answer
        long = {"model": "no such", "training_file": "x", "suffix": "x" * 500_000}
        assert neighbour.post("/fine_tuning/jobs", json=long).status_code == 400
        assert http.get("/fine_tuning/jobs").status_code == 200


def test_while_all_places_are_taken_what_comes_with_its_header_is_answered(
    api_url: str, owner: Engine, tenant: Tenant
) -> None:
    with ExitStack() as stack:
        held: Sockets = []
        for _ in range(LONG_BODIES.places // LONG_BODIES.of_tenant):
            held += stack.enter_context(asking(api_url, add_tenant(owner), LONG_BODIES.of_tenant, sent=b""))
        held += stack.enter_context(asking(api_url, tenant, 1, sent=b""))
        wait_until(lambda: len(answered(held)) == 1)
        (refused,) = answered(held)
        answer = refused.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"long_bodies_busy"' in answer
        (whole,) = stack.enter_context(asking(api_url, tenant, 1, sent=b"{}", num_bytes=2))
        assert whole.recv(65536).startswith(b"HTTP/1.1 400")
        assert not answered([each for each in held if each is not refused])


def test_a_completion_whose_process_died_can_be_done_again(
    database: Database, servers: ServerAddresses, proxy: FaultProxy, owner: Engine, tenant: Tenant, begun: Begun
) -> None:
    (port,) = free_ports(1)
    storage = replace(servers.storage, endpoint=f"127.0.0.1:{proxy.port}")
    row_id = parse_id(IdKind.UPLOAD, begun.id)

    def status() -> Any:
        with service_transaction(owner) as session:
            return session.scalar(text("select status from uploads where id = :id"), {"id": row_id})

    with running_api(database.api_url, storage, port=port) as process, ThreadPoolExecutor(1) as pool:
        with client_of(f"http://127.0.0.1:{port}", tenant) as dying, proxy.during(Hang()):
            lost = pool.submit(begun.complete, dying)
            wait_until(lambda: status() == "completing")
            process.kill()
            process.wait()
        with pytest.raises(httpx.TransportError):
            lost.result()
    with (
        running_api(database.api_url, servers.storage, port=port),
        client_of(f"http://127.0.0.1:{port}", tenant) as http,
    ):
        assert begun.complete(http).json()["error"]["code"] == "upload_completing"
        with tenant_transaction(owner, tenant.id) as session:
            session.execute(text("update uploads set completing_until = now() where id = :id"), {"id": row_id})
        assert begun.complete(http).json()["status"] == "completed"


def test_a_completion_that_fails_leaves_the_upload_as_it_was(http: httpx.Client, begun: Begun) -> None:
    body = {"part_ids": [begun.part_id], "md5": "0" * 32}
    assert http.post(f"/uploads/{begun.id}/complete", json=body).json()["error"]["code"] == "checksum_mismatch"
    assert begun.complete(http).json()["status"] == "completed"


def test_requests_that_wait_for_a_lock_leave_threads_to_other_tenants(
    http: httpx.Client, neighbour: httpx.Client, database: Database, tenant: Tenant, file_id: str
) -> None:
    job = http.post("/fine_tuning/jobs", json={"model": BASE_MODEL, "training_file": file_id}).json()["id"]
    with ThreadPoolExecutor(NUM_ASKED) as pool, psycopg.connect(database.superuser_url) as holding:
        holding.execute("select set_config('app.tenant_id', %s, false)", [str(tenant.id)])
        holding.execute("select 1 from jobs where id = %s for update", [parse_id(IdKind.JOB, job)])
        asked = [pool.submit(http.post, f"/fine_tuning/jobs/{job}/cancel") for _ in range(NUM_ASKED)]
        wait_until(lambda: num_waiting(database) == SHARE_OF_TENANT)
        for _ in range(20):
            assert neighbour.get("/fine_tuning/jobs").status_code == 200
        assert not statuses_of(asked)
        holding.rollback()
        assert {each.result().status_code for each in asked} == {200}


def test_streams_that_wait_to_begin_leave_threads_to_other_tenants(
    http: httpx.Client, neighbour: httpx.Client, database: Database
) -> None:
    path = f"/fine_tuning/jobs/ftjob-{'0' * 32}/stream"
    num_asked = 3 * NUM_ASKED
    with ThreadPoolExecutor(num_asked) as pool, psycopg.connect(database.superuser_url) as holding:
        holding.execute("lock table jobs in access exclusive mode")
        asked = [pool.submit(http.get, path) for _ in range(num_asked)]
        wait_until(lambda: num_waiting(database) == SHARE_OF_TENANT)
        for _ in range(20):
            assert neighbour.get("/api_keys").status_code == 200
            assert num_waiting(database) <= SHARE_OF_TENANT
        holding.rollback()
        assert {each.result().status_code for each in asked} <= {404, 503}  # a lock is not waited for for ever


def test_the_list_of_files_carries_no_problems_and_a_thousand_rows_at_most(
    http: httpx.Client, owner: Engine, tenant: Tenant
) -> None:
    form = {"files": {"file": ("a.jsonl", b"no\n" * 100)}, "data": {"purpose": "fine-tune"}}
    file_id = http.post("/files", **form).raise_for_status().json()["id"]  # type: ignore[arg-type]
    assert len(http.get(f"/files/{file_id}").json()["problems"]) == 100
    (listed,) = http.get("/files").json()["data"]
    assert "problems" not in listed
    assert listed["validation"]["num_problems"] == 100
    with tenant_transaction(owner, tenant.id) as session:
        session.execute(
            text(
                "insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples,"
                " status, problems) select gen_random_uuid(), tenant_id, repeat('\U0001f98a', 255), purpose, size_bytes,"
                " sha256, object_key, num_examples, status, problems from files, generate_series(1, 1200)"
                " where tenant_id = :tenant_id"
            ),
            {"tenant_id": tenant.id},
        )
    answer = http.get("/files?limit=10000")
    page = answer.json()
    assert (len(page["data"]), page["has_more"]) == (1000, True)
    assert len(answer.content) < 3 * 2**20
    rest = http.get(f"/files?after={page['last_id']}").json()
    assert (len(rest["data"]), rest["has_more"]) == (201, False)
    assert json.dumps(rest).count('"problems"') == 0
