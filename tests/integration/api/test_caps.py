"""Bodies that are too large, too deep or too many-parted are refused, quickly and without being kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.conftest import BASE_MODEL, Tenant

GOOD = b'{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}'


@pytest.fixture
def http(api_url: str, tenant: Tenant) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    with httpx.Client(base_url=f"{api_url}/v1", headers=headers, trust_env=False, timeout=60) as client:
        yield client


def post(http: httpx.Client, body: bytes) -> tuple[int, Any, float]:
    started = time.monotonic()
    answer = http.post("/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})
    return answer.status_code, answer.json()["error"]["code"], time.monotonic() - started


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
def test_a_hostile_body_is_refused_in_less_than_two_seconds(http: httpx.Client, body: bytes, status: int) -> None:
    got, _, seconds = post(http, body)
    assert got == status
    assert seconds < 2


def test_the_refusal_of_a_body_of_unknown_length_comes_when_it_passes_the_cap(http: httpx.Client) -> None:
    def pour() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 2**20

    answer = http.post("/fine_tuning/jobs", content=pour(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_a_form_of_a_million_fields_is_refused(http: httpx.Client) -> None:
    part = b'--x\r\ncontent-disposition: form-data; name="a%d"\r\n\r\n1\r\n'
    body = b"".join(part % number for number in range(200_000)) + b"--x--\r\n"
    started = time.monotonic()
    answer = http.post("/files", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
    assert time.monotonic() - started < 5


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
    answer = http.post("/files", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 400
    assert http.get("/files").json()["data"] == []


def test_a_compressed_body_is_not_unpacked(http: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert http.post("/fine_tuning/jobs", content=b"\x1f\x8b\x08" + bytes(100), headers=headers).status_code == 400


def test_metadata_has_its_caps(http: httpx.Client) -> None:
    for metadata in ({f"k{number}": "v" for number in range(17)}, {"k" * 65: "v"}, {"k": "v" * 513}):
        body = {"model": BASE_MODEL, "training_file": f"file-{'0' * 32}", "metadata": metadata}
        assert http.post("/fine_tuning/jobs", json=body).status_code == 400
