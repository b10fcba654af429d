"""The capacity of the control plane: `python -m bench.control_plane [--rounds N] [--seconds S]`.

The whole service runs on its embedded servers, durable, without a worker. locust runs on the same cores and takes a
part of them that grows with the rate. A bare route, served by the same server in as many processes, shows the capacity
that remains. Measured in turns, min / median / max over the rounds: submissions as fast as they are answered, and the
status of one job at 500 requests a second, each beside a bare FastAPI route under the same load. Last, 500 open event
streams: the time from the answer to a cancellation until its stream has reported it and ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import yaml

from bench.bare import BASE_ID
from bench.workload import command, machine
from local.ports import free_ports
from local.processes import ChildProcess, ProcessSpec
from local.stack import LocalStack

NUM_TENANTS = 20
NUM_USERS = 20
STATUS_RATE = 500
NUM_STREAMS = 500
NUM_PROCESSES = 2
ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 10


@dataclass(frozen=True)
class Load:
    """What one run of locust has measured."""

    rate: float
    p50_ms: float
    p99_ms: float
    num_failed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=15)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before. {machine()}\n$ {command()}\n")
    with tempfile.TemporaryDirectory() as name, running_stack(Path(name)) as stack, running_bare(Path(name)) as bare:
        targets = make_tenants(stack)
        kinds: dict[str, Callable[[], Load]] = {
            "submissions": lambda: load(stack.api_url, "Submitter", targets, seconds=options.seconds),
            "a bare route": lambda: load(bare, "Bare", targets, seconds=options.seconds),
            f"status at {STATUS_RATE}/s": lambda: load(
                stack.api_url, "Follower", targets, rate=STATUS_RATE, seconds=options.seconds
            ),
            f"a bare route at {STATUS_RATE}/s": lambda: load(
                bare, "Bare", targets, rate=STATUS_RATE, seconds=options.seconds
            ),
        }
        found: dict[str, list[Load]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind, run in kinds.items():
                found[kind].append(run())
        print("| what | requests/s | p50, ms | p99, ms | failed |\n|---|---|---|---|---|")
        for kind, loads in found.items():
            print(describe(kind, loads), flush=True)
        first, bare_first, second, bare_second = found.values()
        rates = [mine.rate / other.rate for mine, other in zip(first, bare_first, strict=True)]
        tails = [mine.p99_ms / other.p99_ms for mine, other in zip(second, bare_second, strict=True)]
        times = [mine.p50_ms / other.p50_ms for mine, other in zip(second, bare_second, strict=True)]
        print(f"\nsubmissions/s over the bare route's: {spread(rates, 2)}")
        print(f"p50 of a status over the bare route's: {spread(times, 1)}; p99: {spread(tails, 1)}")
        print(asyncio.run(follow_many(stack, targets)))


@contextmanager
def running_stack(directory: Path, *, num_processes: int = NUM_PROCESSES) -> Iterator[LocalStack]:
    entry = {
        "id": BASE_ID,
        "source": {"kind": "path", "location": "/nowhere"},
        "target_modules": ["q_proj", "v_proj"],
        "max_seq_len": 256,
    }
    registry = directory / "registry.yaml"
    registry.write_text(yaml.safe_dump({"base_models": [entry]}))
    env = {"ESPALIER_REQUESTS_PER_MINUTE": "1000000", "ESPALIER_API_PROCESSES": str(num_processes)}
    with LocalStack(directory / "data", registry_path=registry, env=env) as stack:
        stack.process("worker").stop()
        yield stack


@contextmanager
def running_bare(directory: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    options = ["--workers", str(NUM_PROCESSES), "--loop", "uvloop", "--http", "httptools"]
    argv = [sys.executable, "-m", "uvicorn", "bench.bare:app", "--port", str(port), "--no-access-log", *options]
    child = ChildProcess(ProcessSpec("bare", argv), directory)
    url = f"http://127.0.0.1:{port}"
    child.wait_until(lambda: is_answered(f"{url}/bare"), timeout_seconds=30)
    yield url
    child.stop()


def is_answered(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


def make_tenants(stack: LocalStack) -> list[tuple[str, str, str]]:
    """Return an API key, a file and a job of each of the tenants, whose queues have room for all that comes."""
    targets = []
    for number in range(NUM_TENANTS):
        api_key = stack.create_tenant(f"tenant-{number}")
        with psycopg.connect(stack.owner_url) as connection:
            connection.execute("update tenants set max_queued = 10000000")
        with client_of(stack, api_key) as client:
            form: dict[str, Any] = {"files": {"file": ("rows.jsonl", ROWS)}, "data": {"purpose": "fine-tune"}}
            file_id = client.post("/v1/files", **form).raise_for_status().json()["id"]
            targets.append((api_key, file_id, submit(client, file_id)))
    return targets


def client_of(stack: LocalStack, api_key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {api_key}"}
    return httpx.Client(base_url=stack.api_url, headers=headers, trust_env=False, timeout=30)


def submit(client: httpx.Client, file_id: str) -> str:
    answer = client.post("/v1/fine_tuning/jobs", json={"model": BASE_ID, "training_file": file_id})
    return str(answer.raise_for_status().json()["id"])


def load(url: str, user: str, targets: Sequence[Sequence[str]], *, seconds: int, rate: float = 0) -> Load:
    """Run locust and return what it measured. Raises CalledProcessError."""
    argv = [sys.executable, "-m", "locust", "-f", "bench/load.py", user, "--headless", "--skip-log", "--json"]
    users = str(NUM_USERS)
    argv += ["--host", url, "-u", users, "-r", users, "-t", f"{seconds}s", "--exit-code-on-error", "0"]
    env = {**os.environ, "TARGETS": json.dumps(targets), "RATE": str(rate), "NUM_USERS": str(NUM_USERS)}
    said = subprocess.run(argv, env=env, check=True, capture_output=True, text=True).stdout
    return as_load(json.loads(said)[0])


def as_load(told: dict[str, Any]) -> Load:
    """Read locust's histogram: `response_times` maps milliseconds, rounded to two digits, to counts."""
    counts = sorted((float(ms), count) for ms, count in told["response_times"].items())
    times = [ms for ms, count in counts for _ in range(count)]
    seconds = told["last_request_timestamp"] - told["start_time"]
    return Load(
        rate=told["num_requests"] / seconds,
        p50_ms=statistics.median(times),
        p99_ms=times[int(0.99 * len(times))],
        num_failed=told["num_failures"],
    )


def describe(kind: str, loads: Sequence[Load]) -> str:
    columns = [
        spread([each.rate for each in loads], 0),
        spread([each.p50_ms for each in loads], 0),
        spread([each.p99_ms for each in loads], 0),
        str(sum(each.num_failed for each in loads)),
    ]
    return f"| {kind} | {' | '.join(columns)} |"


def spread(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{each:.{digits}f}" for each in (min(values), statistics.median(values), max(values)))


async def follow_many(stack: LocalStack, targets: Sequence[Sequence[str]]) -> str:
    """Open the streams, cancel every job, and tell how long the ends took to arrive."""
    pairs = []
    for number in range(NUM_STREAMS):
        api_key, file_id, _ = targets[number % len(targets)]
        with client_of(stack, api_key) as client:
            pairs.append((api_key, submit(client, file_id)))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=stack.api_url, trust_env=False, timeout=120, limits=limits) as follower:
        opened: list[str] = []
        ends: dict[str, float] = {}

        async def follow(api_key: str, job_id: str) -> None:
            headers = {"authorization": f"Bearer {api_key}"}
            async with follower.stream("GET", f"/v1/fine_tuning/jobs/{job_id}/stream", headers=headers) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line == ": open":
                        opened.append(job_id)
                    if line == "event: end":
                        ends[job_id] = time.monotonic()

        followers = [asyncio.create_task(follow(*pair)) for pair in pairs]
        while len(opened) < NUM_STREAMS:
            if broken := [task.exception() for task in followers if task.done()]:
                raise RuntimeError(f"{len(broken)} streams ended early: {broken[0]!r}")
            await asyncio.sleep(0.05)
        delays = []
        for api_key, job_id in pairs:
            headers = {"authorization": f"Bearer {api_key}"}
            (await follower.post(f"/v1/fine_tuning/jobs/{job_id}/cancel", headers=headers)).raise_for_status()
            delays.append((job_id, time.monotonic()))
        await asyncio.gather(*followers)
        late = sorted(ends[job_id] - cancelled_at for job_id, cancelled_at in delays)
    return (
        f"{len(opened)} streams open at once, {len(ends)} told of their end; behind the answer to the cancellation by "
        f"{statistics.median(late) * 1000:.0f} ms in the median, {late[int(0.99 * len(late))] * 1000:.0f} ms in 99 %"
    )


if __name__ == "__main__":
    main()
