"""Bodies that are too large, too deeply nested or in too many parts are refused quickly, and not stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest
from sqlalchemy import Engine

from local.ports import free_ports
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.bases import BASE_MODEL
from tests.factories.tenants import Tenant, add_tenant
from tests.processes import running_api
from tests.waiting import PATIENCE_SECONDS

GOOD = b'{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}'


FORM = {"content-type": "multipart/form-data; boundary=x"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def api(database: Database, servers: ServerAddresses) -> Iterator[psutil.Process]:
    """An API process of this module's own: what it spends is spent on these requests."""
    with running_api(database.api_url, servers.storage, port=free_ports(1)[0]) as process:
        yield psutil.Process(process.pid)


@pytest.fixture
def http(api: psutil.Process, tenant: Tenant) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    url = f"http://127.0.0.1:{api.environ()['ESPALIER_API_PORT']}/v1"
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=PATIENCE_SECONDS) as client:
        yield client


def cpu_seconds(api: psutil.Process, ask: Callable[[], object]) -> float:
    """Return what a request costs the API's processor, which is the same on a busy machine: the cheapest of three."""

    def spend() -> float:
        before = api.cpu_times()
        ask()
        after = api.cpu_times()
        return float(after.user + after.system - before.user - before.system)

    return min(spend() for _ in range(3))


@pytest.fixture(scope="module")
def honest_cost(api: psutil.Process, owner: Engine) -> float:
    """What a body of nearly the largest size costs that is dense, shallow and merely wrong."""
    headers = {"authorization": f"Bearer {add_tenant(owner).api_key}", **JSON}
    url = f"http://127.0.0.1:{api.environ()['ESPALIER_API_PORT']}/v1/fine_tuning/jobs"
    body = b'{"model": [' + b'{"a":0},' * 250_000 + b"0]}"
    with httpx.Client(headers=headers, trust_env=False, timeout=PATIENCE_SECONDS) as client:
        return cpu_seconds(api, lambda: client.post(url, content=body))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 1_000_000, 400),
        (b'{"model": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, 400),
        (b'{"model": ' + b"9" * 1_000_000 + b"}", 400),
        (b'{"model": NaN}', 400),
        (b'{"model": "\xff"}', 400),
        (json.dumps({f"k{number}": number for number in range(100_000)}).encode(), 400),
        (b" " * (3 * 2**20), 413),
    ],
    ids=["deep-array", "deep-object", "huge-number", "nan", "not-utf8", "many-keys", "too-large"],
)
def test_a_hostile_body_is_refused_and_costs_about_as_much_as_an_honest_one(
    api: psutil.Process, http: httpx.Client, honest_cost: float, body: bytes, status: int
) -> None:
    assert http.post("/fine_tuning/jobs", content=body, headers=JSON).status_code == status
    assert cpu_seconds(api, lambda: http.post("/fine_tuning/jobs", content=body, headers=JSON)) < 20 * honest_cost


def test_the_refusal_of_a_body_of_unknown_length_comes_when_it_passes_the_cap(http: httpx.Client) -> None:
    def pour() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 2**20

    answer = http.post("/fine_tuning/jobs", content=pour(), headers=JSON)
    assert answer.status_code == 413


def test_a_form_of_a_million_fields_is_refused_and_costs_less_than_an_honest_one(
    api: psutil.Process, http: httpx.Client
) -> None:
    part = b'--x\r\ncontent-disposition: form-data; name="a%d"\r\n\r\n1\r\n'
    body = b"".join(part % number for number in range(200_000)) + b"--x--\r\n"
    answer = http.post("/files", content=body, headers=FORM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
    rows = {"file": ("a.jsonl", (GOOD + b"\n") * (len(body) // len(GOOD)))}
    honest_cost = cpu_seconds(api, lambda: http.post("/files", files=rows, data={"purpose": "fine-tune"}))
    assert cpu_seconds(api, lambda: http.post("/files", content=body, headers=FORM)) < honest_cost


@pytest.mark.parametrize(
    "head",
    [
        b'content-disposition: form-data; name="file"; filename="' + b"x" * 2**20 + b'"\r\n',
        b'content-disposition: form-data; name="file"; filename="x"\r\n' + b"x-y: z\r\n" * 10_000,
    ],
    ids=["long-header", "many-headers"],
)
def test_a_part_with_a_hostile_head_is_refused(http: httpx.Client, head: bytes) -> None:
    body = b"--x\r\n" + head + b"\r\n" + GOOD + b"\r\n--x--\r\n"
    answer = http.post("/files", content=body, headers=FORM)
    assert answer.status_code == 400
    assert http.get("/files").json()["data"] == []


def test_a_compressed_body_is_not_unpacked(http: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert http.post("/fine_tuning/jobs", content=b"\x1f\x8b\x08" + bytes(100), headers=headers).status_code == 400


def test_metadata_has_its_caps(http: httpx.Client) -> None:
    for metadata in ({f"k{number}": "v" for number in range(17)}, {"k" * 65: "v"}, {"k": "v" * 513}):
        body = {"model": BASE_MODEL, "training_file": f"file-{'0' * 32}", "metadata": metadata}
        assert http.post("/fine_tuning/jobs", json=body).status_code == 400
