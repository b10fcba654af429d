"""Clients that upload slowly, or vanish, delay no other client."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import Engine

from api.admission import MULTIPART_BODIES
from tests.factories.files import GOOD, upload
from tests.factories.tenants import Tenant, add_tenant
from tests.waiting import PATIENCE_SECONDS, wait_until

BEGINNING = '--b\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{"messa'


def begin_upload(api_url: str, tenant: Tenant) -> socket.socket:
    """Send the beginning of an upload, and no more."""
    address = urlsplit(api_url)
    made = socket.create_connection((address.hostname, address.port), timeout=PATIENCE_SECONDS)
    headers = {
        "host": "x",
        "authorization": f"Bearer {tenant.api_key}",
        "content-type": "multipart/form-data; boundary=b",
        "content-length": "100000",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    made.sendall(f"POST /v1/files HTTP/1.1\r\n{lines}\r\n{BEGINNING}".encode())
    return made


@pytest.fixture
def slow_uploads(api_url: str) -> Iterator[Callable[[Tenant, int], list[socket.socket]]]:
    with ExitStack() as stack:
        yield lambda tenant, count: [stack.enter_context(begin_upload(api_url, tenant)) for _ in range(count)]


def answer_of_one(held: list[socket.socket]) -> bytes:
    """Return what the first to be answered is told; which of them came last is the service's to say."""
    (answered, *_), _, _ = select.select(held, [], [], PATIENCE_SECONDS)
    answer = b""
    while b"\r\n\r\n{" not in answer:
        answer += answered.recv(4096)
    return bytes(answer)


def test_one_tenant_can_hold_up_neither_others_uploads_nor_anything_else(
    client: OpenAI,
    other_client: OpenAI,
    api_url: str,
    tenant: Tenant,
    slow_uploads: Callable[[Tenant, int], list[socket.socket]],
) -> None:
    held = slow_uploads(tenant, MULTIPART_BODIES.of_tenant + 1)
    answer = answer_of_one(held)
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"too_many_uploads" in answer
    assert upload(other_client, GOOD).status == "processed"
    assert client.models.list().data
    for each in held:
        each.close()
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    form = {"files": {"file": ("a.jsonl", GOOD)}, "data": {"purpose": "fine-tune"}}
    wait_until(lambda: httpx.post(f"{api_url}/v1/files", headers=headers, **form, timeout=PATIENCE_SECONDS).is_success)  # type: ignore[arg-type]


def test_all_slow_uploads_together_leave_threads_for_everything_else(
    api_url: str, owner: Engine, slow_uploads: Callable[[Tenant, int], list[socket.socket]]
) -> None:
    tenants = [add_tenant(owner) for _ in range(MULTIPART_BODIES.places // MULTIPART_BODIES.of_tenant)]
    held = [each for tenant in tenants for each in slow_uploads(tenant, MULTIPART_BODIES.of_tenant)]
    held += slow_uploads(add_tenant(owner), 1)
    answer = answer_of_one(held)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"uploads_busy" in answer
    assert httpx.get(f"{api_url}/readyz", timeout=PATIENCE_SECONDS).is_success
    answered, _, _ = select.select(held, [], [], 0)
    assert len(answered) <= 1, "the others were still under way when everything else was answered"


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/v1/uploads", "/v1/fine_tuning/jobs/x/cancel"])
def test_a_body_that_would_be_read_whole_has_a_cap(api_url: str, tenant: Tenant, path: str) -> None:
    headers = {"authorization": f"Bearer {tenant.api_key}", "content-type": "application/json"}
    body = b'{"model": "' + b"x" * 2**21 + b'"}'
    answer = httpx.post(f"{api_url}{path}", headers=headers, content=body, timeout=PATIENCE_SECONDS)
    if path.endswith("cancel"):  # nobody reads it
        assert answer.status_code == 404
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


def test_clients_that_vanish_in_the_middle_leave_nothing_behind(
    client: OpenAI, api_url: str, tenant: Tenant, slow_uploads: Callable[[Tenant, int], list[socket.socket]]
) -> None:
    for each in slow_uploads(tenant, MULTIPART_BODIES.of_tenant):
        each.close()
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    form = {"files": {"file": ("whole.jsonl", GOOD)}, "data": {"purpose": "fine-tune"}}
    # All their places are free again only when every one of them has been noticed and cleaned up after.
    wait_until(lambda: httpx.post(f"{api_url}/v1/files", headers=headers, **form, timeout=PATIENCE_SECONDS).is_success)  # type: ignore[arg-type]
    assert {file.filename for file in client.files.list().data} == {"whole.jsonl"}
