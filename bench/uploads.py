"""The cost of an upload for the API: `python -m bench.uploads [--megabytes N]`.

The servers are real, and the API process runs on one core. The API has its core to itself as far as the machine allows:
client and servers are kept on the others. Growth is the highest resident size during the upload, sampled every 10 ms,
minus the size before it, after a first small upload as a warm-up. Hostile files are refused as soon as they pass the
cap. Their bodies are read to the end and discarded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from core.db.migrate import RoleLogin, login_url
from core.db.session import connect, operator_transaction
from core.domain.datasets import DatasetChecker
from core.services.api_keys import issue_api_key
from core.services.tenants import create_tenant
from local.ports import free_ports
from local.processes import ChildProcess, ProcessSpec
from local.servers import LocalServers
from local.stack import answers, default_registry, prepare_database
from tests.processes import storage_settings

MEGABYTE = 2**20
CHUNK_BYTES = 256 * 1024
ROW = {
    "messages": [
        {
            "role": "system",
            "content": "You answer questions about the handbook, briefly and with the section's number.",
        },
        {"role": "user", "content": "How many days of leave does somebody have who joined in the middle of the year?"},
        {
            "role": "assistant",
            "content": "Half of the yearly days, rounded up to the next half day; see section 4.2." * 4,
        },
    ]
}
LINE = json.dumps(ROW).encode() + b"\n"
HOSTILE: dict[str, Callable[[], Iterator[bytes]]] = {
    "one line of 200 MB": lambda: _repeat(b"x" * CHUNK_BYTES, 200 * MEGABYTE),
    "one object of 10^7 keys": lambda: _keys(10**7),
    "nested 10^7 deep": lambda: _repeat(b"[" * CHUNK_BYTES, 10**7),
    "200 MB of spaces": lambda: _repeat(b" " * CHUNK_BYTES, 200 * MEGABYTE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    size_bytes = parser.parse_args().megabytes * MEGABYTE
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    seconds = _check_alone(size_bytes)
    print(f"| checker alone | {size_bytes / seconds / 1e6:.0f} MB/s | |")
    with tempfile.TemporaryDirectory() as directory, _running_api(Path(directory)) as (url, api_key, process):
        _upload(url, api_key, _repeat(LINE, MEGABYTE), process)
        status, seconds, growth = _upload(url, api_key, _repeat(LINE, size_bytes), process)
        rate = size_bytes / seconds / 1e6
        print(f"| upload of {size_bytes // MEGABYTE} MiB: {status} | {rate:.0f} MB/s | RSS +{growth:.1f} MB |")
        for name, make in HOSTILE.items():
            status, seconds, growth = _upload(url, api_key, make(), process)
            print(f"| {name}: {status} | {seconds:.2f} s | RSS +{growth:.1f} MB |")


def _check_alone(size_bytes: int) -> float:
    checker = DatasetChecker()
    chunks = list(_repeat(LINE * (CHUNK_BYTES // len(LINE)), 8 * MEGABYTE))
    started = time.process_time()
    for number in range(size_bytes // CHUNK_BYTES):
        checker.feed(chunks[number % len(chunks)])
    checker.close()
    return time.process_time() - started


def _upload(url: str, api_key: str, content: Iterator[bytes], process: psutil.Process) -> tuple[str, float, float]:
    """Send a file and return what was answered, the seconds until then, and by how many MB the API grew."""
    before = peak = process.memory_info().rss
    is_done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not is_done.wait(0.01):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    answer = httpx.post(
        f"{url}/v1/files",
        content=_form(content),
        headers={"authorization": f"Bearer {api_key}", "content-type": "multipart/form-data; boundary=bound"},
        timeout=300,
        trust_env=False,
    )
    seconds = time.perf_counter() - started
    is_done.set()
    sampler.join()
    told = answer.json()
    verdict = told["error"]["code"] if "error" in told else told["status"]
    return f"{answer.status_code} {verdict}", seconds, (peak - before) / 1e6


def _form(content: Iterator[bytes]) -> Iterator[bytes]:
    yield b'--bound\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    yield b'--bound\r\ncontent-disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    yield from content
    yield b"\r\n--bound--\r\n"


def _repeat(piece: bytes, size_bytes: int) -> Iterator[bytes]:
    block = piece * max(1, CHUNK_BYTES // len(piece))
    for _ in range(size_bytes // len(block)):
        yield block


def _keys(number: int) -> Iterator[bytes]:
    yield b'{"k": 0'
    for start in range(0, number, 10_000):
        yield "".join(f', "k{key}": 0' for key in range(start, start + 10_000)).encode()
    yield b"}\n"


@contextmanager
def _running_api(directory: Path) -> Iterator[tuple[str, str, psutil.Process]]:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[1:]) or set(cores))
    with LocalServers(directory / "servers", is_durable=False) as servers:
        login = RoleLogin("espalier_api", servers.secrets.api)
        prepare_database(servers.addresses.postgres_url, default_registry(), logins=(login,))
        engine = connect(servers.addresses.postgres_url)
        with operator_transaction(engine, actor="bench") as session:
            api_key = str(issue_api_key(session, create_tenant(session, "bench").id, name="bench").api_key)
        engine.dispose()
        (port,) = free_ports(1)
        storage = servers.addresses.storage
        env = {
            "ESPALIER_DATABASE_URL": login_url(servers.addresses.postgres_url, login),
            **storage_settings(storage),
            "ESPALIER_API_PORT": str(port),
        }
        spec = ProcessSpec("api", [sys.executable, "-m", "api"], env, stop_seconds=30.0)
        url = f"http://127.0.0.1:{port}"
        child = ChildProcess(spec, directory / "logs")
        try:
            child.wait_until(lambda: answers(url), timeout_seconds=60)
            process = psutil.Process(child.pid)
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores[:1])
            yield url, api_key, process
        finally:
            child.stop()


if __name__ == "__main__":
    main()
