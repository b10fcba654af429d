"""How much an attack delays another tenant's requests: `python -m bench.attacks [--rounds N] [--only X]`.

The whole service runs on its embedded servers without a worker, with the API in one process. Attacker and servers share
the same cores. A tenant asks for the status of its job 20 times a second, each time on schedule, whether or not the
last request was answered. It does so alone and under an attack, in turns. A refused attacker comes again after a
second. The goal is a p99 of at most 250 ms under each attack.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psycopg
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from bench.bare import BASE_ID
from bench.control_plane import ROWS, client_of, running_stack, spread, submit
from bench.workload import command, machine
from core.db.session import connect, service_transaction
from core.domain.datasets.tokenizers import TokenizerBundle
from core.domain.objects import tokenizer_key
from core.services.base_models import record_tokenizer
from core.storage import S3ObjectStore
from local.stack import LocalStack, StackState

RATE = 20
GOAL_MS = 250
MEGABYTE = 2**20
FORM = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'


@dataclass(frozen=True)
class Target:
    """What an attacker knows: where the service is, and a key, a file and an upload of its own."""

    url: str
    api_key: str
    file_id: str
    upload_id: str
    part_ids: list[str]

    @property
    def key_header(self) -> bytes:
        return f"authorization: Bearer {self.api_key}\r\n".encode()


@dataclass(frozen=True)
class Delays:
    """How long the victim waited, in ms, and how many of its requests failed."""

    p50: float
    p99: float
    worst: float
    num_failed: int


async def previews(target: Target) -> None:
    await ask_again(target, 60, "POST", f"/v1/files/{target.file_id}/preview", json={"model": BASE_ID})


async def completes(target: Target) -> None:
    body = {"part_ids": target.part_ids, "md5": "0" * 32}
    await ask_again(target, 45, "POST", f"/v1/uploads/{target.upload_id}/complete", json=body)


async def downloads(target: Target) -> None:
    await ask_again(target, 45, "GET", f"/v1/files/{target.file_id}/content")


async def large_lists(target: Target) -> None:
    paths = ("/v1/files?limit=10000", "/v1/models", "/v1/fine_tuning/jobs?limit=100")
    await asyncio.gather(*(ask_again(target, 15, "GET", path) for path in paths))


async def uploads(target: Target) -> None:
    form = {"files": {"file": ("a.jsonl", ROWS * 20_000)}, "data": {"purpose": "fine-tune"}}
    await ask_again(target, 12, "POST", "/v1/files", **form)


async def endless_headers(target: Target) -> None:
    await connect_again(target, 4, b"GET / HTTP/1.1\r\nx-a: ", piece=b"a" * 65536, seconds=0)


async def half_open(target: Target) -> None:
    await connect_again(target, 1100, b"GET / HTTP/1.1\r\nx-a: ", piece=b"", seconds=1)


async def slow_bodies(target: Target) -> None:
    length = b"host: x\r\ncontent-length: 1000000\r\n"
    upload = b"POST /v1/files HTTP/1.1\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    job = b"POST /v1/fine_tuning/jobs HTTP/1.1\r\ncontent-type: application/json\r\n"
    heads = (upload + target.key_header, job + target.key_header, job)
    slow = (connect_again(target, 100, head + length + b"\r\n" + FORM, piece=b"a", seconds=1) for head in heads)
    await asyncio.gather(*slow)


async def bodies_not_begun(target: Target) -> None:
    head = b"POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n"
    await connect_again(target, 2000, head + target.key_header + b"\r\n", piece=b"", seconds=1)


ATTACKS: dict[str, Callable[[Target], Awaitable[None]]] = {
    "60 previews": previews,
    "45 completions of one upload": completes,
    "45 downloads, the store hung": downloads,
    "45 large lists": large_lists,
    "12 uploads as fast as can be": uploads,
    "4 endless headers": endless_headers,
    "1,100 half-open connections": half_open,
    "300 slow bodies": slow_bodies,
    "2,000 bodies that do not begin": bodies_not_begun,
}


async def ask_again(target: Target, num_at_once: int, method: str, path: str, **options: object) -> None:
    """Send a request again and again, so many at once."""
    limits = httpx.Limits(max_connections=None)
    headers = {"authorization": f"Bearer {target.api_key}"}
    async with httpx.AsyncClient(
        base_url=target.url, headers=headers, trust_env=False, timeout=120, limits=limits
    ) as client:

        async def insist() -> None:
            while True:
                with suppress(httpx.TransportError):
                    answer = await client.request(method, path, **options)  # type: ignore[arg-type]
                    if answer.is_success:
                        continue
                await asyncio.sleep(1)

        await asyncio.gather(*(insist() for _ in range(num_at_once)))


async def connect_again(target: Target, num_at_once: int, head: bytes, *, piece: bytes, seconds: float) -> None:
    """Hold so many connections that begin with a head and go on with pieces, and make each anew when it is closed."""
    address = httpx.URL(target.url)

    async def insist() -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(address.host, address.port)
                writer.write(head)
                if not piece:
                    await reader.read(1)  # a refusal, or the end
                    writer.close()
                    await asyncio.sleep(seconds)
                while piece and not reader.at_eof():
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(seconds)
                writer.close()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(insist() for _ in range(num_at_once)))


async def attack(name: str, target: Target) -> None:
    """Attack for ever, and say so once it is under way."""
    asyncio.get_running_loop().call_later(3, lambda: print("under way", flush=True))
    await ATTACKS[name](target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--only", choices=list(ATTACKS))
    parser.add_argument("--attack", choices=list(ATTACKS), help=argparse.SUPPRESS)  # be the attacker
    options = parser.parse_args()
    if options.attack:
        asyncio.run(attack(options.attack, Target(**json.loads(os.environ["TARGET"]))))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before. {machine()}\n$ {command()}\n")
    with tempfile.TemporaryDirectory() as name, running_stack(Path(name), num_processes=1) as stack:
        target, victim = prepare(stack), prepare_victim(stack)
        print(
            "| attack | alone: p50, ms | p99 | under it: p50, ms | p99 | worst | failed |\n"
            "|---|---|---|---|---|---|---|"
        )
        for kind in [options.only] if options.only else ATTACKS:
            alone, under = [], []
            for _ in range(options.rounds):
                alone.append(asyncio.run(follow(*victim, seconds=options.seconds)))
                with attacking(kind, target, stack):
                    under.append(asyncio.run(follow(*victim, seconds=options.seconds)))
            print(describe(kind, alone, under), flush=True)


def describe(kind: str, alone: Sequence[Delays], under: Sequence[Delays]) -> str:
    columns = [
        spread([each.p50 for each in alone], 0),
        spread([each.p99 for each in alone], 0),
        spread([each.p50 for each in under], 0),
        spread([each.p99 for each in under], 0),
        f"{max(each.worst for each in under):.0f}",
        str(sum(each.num_failed for each in (*alone, *under))),
    ]
    return f"| {kind} | {' | '.join(columns)} |"


@contextmanager
def attacking(kind: str, target: Target, stack: LocalStack) -> Iterator[None]:
    """Attack from a process of its own for as long as the context is open."""
    store_pid = StackState.read(stack.data_dir).pids["s3"]
    env = {**os.environ, "TARGET": json.dumps(asdict(target))}
    is_hanging = ATTACKS[kind] is downloads
    argv = [sys.executable, "-m", "bench.attacks", "--attack", kind]
    attacker = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE)
    try:
        if is_hanging:
            os.kill(store_pid, signal.SIGSTOP)
        assert attacker.stdout is not None
        attacker.stdout.readline()
        yield
    finally:
        attacker.kill()
        attacker.wait()
        if is_hanging:
            os.kill(store_pid, signal.SIGCONT)
        settle(target.url)


def settle(url: str) -> None:
    """Wait until what an attack has left behind is done, for a minute at most."""
    num_quick = 0
    deadline = time.monotonic() + 60
    while num_quick < 10 and time.monotonic() < deadline:
        began = time.monotonic()
        httpx.get(f"{url}/readyz", trust_env=False, timeout=60)
        num_quick = num_quick + 1 if time.monotonic() - began < 0.2 else 0
        time.sleep(0.1)


async def follow(url: str, api_key: str, *, seconds: float) -> Delays:
    """Ask for a job's status at a steady rate and return how long the answers took."""
    headers = {"authorization": f"Bearer {api_key}"}
    loop = asyncio.get_running_loop()
    async with httpx.AsyncClient(headers=headers, trust_env=False, timeout=60) as client:

        async def look(at: float) -> tuple[float, bool]:
            await asyncio.sleep(at - loop.time())
            try:
                is_good = (await client.get(url)).is_success
            except httpx.TransportError:
                is_good = False
            return (loop.time() - at) * 1000, is_good

        begin = loop.time() + 0.1
        told = await asyncio.gather(*(look(begin + number / RATE) for number in range(int(seconds * RATE))))
    delays = sorted(delay for delay, _ in told)
    p99 = delays[int(0.99 * len(delays))]
    return Delays(statistics.median(delays), p99, delays[-1], sum(not is_good for _, is_good in told))


def prepare_victim(stack: LocalStack) -> tuple[str, str]:
    """Return the URL of a job's status, and its tenant's key."""
    api_key = stack.create_tenant("small")
    with client_of(stack, api_key) as client:
        job_id = submit(client, upload(client, ROWS))
    return f"{stack.api_url}/v1/fine_tuning/jobs/{job_id}", api_key


def prepare(stack: LocalStack) -> Target:
    """Give the attacking tenant a file of 50 MB, an upload of as much, 1,200 files with problems and 100 jobs."""
    api_key = stack.create_tenant("whale")
    publish_tokenizer(stack)
    with client_of(stack, api_key) as client:
        client.timeout = httpx.Timeout(300)
        content = ROWS * (50 * MEGABYTE // len(ROWS))
        file_id = upload(client, content)
        faulty_id = upload(client, b"no\n" * 100)
        metadata = {f"key-{number}": "v" * 512 for number in range(16)}
        for _ in range(100):
            job = {"model": BASE_ID, "training_file": file_id, "metadata": metadata}
            client.post("/v1/fine_tuning/jobs", json=job).raise_for_status()
        new = {"bytes": len(content), "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
        upload_id = client.post("/v1/uploads", json=new).raise_for_status().json()["id"]
        part = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": content}).raise_for_status().json()
    with psycopg.connect(stack.owner_url) as connection:
        connection.execute(
            "insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status,"
            " problems, report) select gen_random_uuid(), tenant_id, filename, purpose, size_bytes, sha256, object_key,"
            " num_examples, status, problems, report from files, generate_series(1, 1200) where id = %s",
            [faulty_id.removeprefix("file-")],
        )
    return Target(stack.api_url, api_key, file_id, upload_id, [part["id"]])


def upload(client: httpx.Client, content: bytes) -> str:
    form = {"files": {"file": ("rows.jsonl", content)}, "data": {"purpose": "fine-tune"}}
    return str(client.post("/v1/files", **form).raise_for_status().json()["id"])  # type: ignore[arg-type]


def publish_tokenizer(stack: LocalStack) -> None:
    """Do what a worker does that has loaded the base: here, one whose tokens are letters."""
    letters = "\n" + "".join(map(chr, range(32, 127)))
    backend = Tokenizer(WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="?"))
    backend.pre_tokenizer = Split("", "isolated")
    template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    bundle = TokenizerBundle(backend=backend.to_str(), chat_template=template, special_tokens={"eos_token": "\n"})
    key = tokenizer_key("0" * 64)
    body = bundle.model_dump_json().encode()
    S3ObjectStore(stack.addresses.storage).put_bytes(key, body, content_type="application/json")
    engine = connect(stack.owner_url)
    with service_transaction(engine) as session:
        record_tokenizer(session, BASE_ID, object_key=key)
    engine.dispose()


if __name__ == "__main__":
    main()
