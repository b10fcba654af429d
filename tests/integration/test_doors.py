"""No socket of the running stack serves another user of the machine, or a web page."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from core.storage import S3ObjectStore
from local.s3_server import BUCKET
from local.stack import LocalStack, StackState
from tests.integration import strangers

KEY = "tenants/acme/rows.jsonl"
ROWS = b'{"messages": "what only acme may read"}\n' * 50
_LISTENING_TCP, _LISTENING_UNIX = "0A", "00010000"


@dataclass(frozen=True)
class Stack:
    """A running stack with one tenant's object in its store, and every place where it listens."""

    store: S3ObjectStore
    doors: list[Any]
    file_ids: list[str]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    registry = tmp_path_factory.mktemp("registry") / "registry.yaml"
    base = {"id": "acme-labs/tiny", "source": {"kind": "path", "location": "/nowhere"}, "target_modules": ["q_proj"]}
    registry.write_text(yaml.safe_dump({"base_models": [base | {"max_seq_len": 256}]}))
    with LocalStack(tmp_path_factory.mktemp("doors") / "data", registry_path=registry, is_durable=False) as running:
        store = S3ObjectStore(running.addresses.storage)
        store.put_stream(KEY, [ROWS], content_type="application/jsonl")
        heads = [psutil.Process(pid) for pid in StackState.read(running.data_dir).pids.values()]
        processes = [each for head in heads for each in (head, *head.children(recursive=True))]
        yield Stack(store, list(listening(processes)), list(file_ids(running.data_dir / "s3")))


def listening(processes: list[psutil.Process]) -> Iterator[Any]:
    """Yield where processes listen, as the kernel lists it: [host, port], or the path of a Unix socket."""
    owners = {inode: process for process in processes for inode in socket_inodes(process)}
    for name in ("tcp", "tcp6"):
        for fields in table(name):
            if fields[3] == _LISTENING_TCP and fields[9] in owners:
                address, _, port = fields[1].partition(":")
                yield [readable(address), int(port, 16)]
    for fields in table("unix"):
        if fields[3] == _LISTENING_UNIX and fields[6] in owners:
            yield str(Path(f"/proc/{owners[fields[6]].pid}/cwd").resolve() / fields[7])


def table(name: str) -> list[list[str]]:
    return [line.split() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]


def readable(address: str) -> str:
    """Return the address at which a local client reaches a listener that the kernel shows in hexadecimal."""
    if len(address) == 8:
        return ".".join(str(byte) for byte in reversed(bytes.fromhex(address))).replace("0.0.0.0", "127.0.0.1")
    return "::1"


def socket_inodes(process: psutil.Process) -> set[str]:
    links = []
    for path in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            links.append(str(path.readlink()))
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def file_ids(directory: Path) -> Iterator[str]:
    """Yield the name of every stored object at the volume server, which a stranger would have to guess."""
    for index in directory.glob(f"{BUCKET}_*.idx"):
        volume, content = index.stem.rpartition("_")[2], index.with_suffix(".dat").read_bytes()
        for needle, offset, _, size in struct.iter_unpack(">QIBi", index.read_bytes()):
            if size > 0:
                (cookie,) = struct.unpack_from(">I", content, offset * 8)
                yield f"{volume},{needle:02x}{cookie:08x}"


def ask_as_a_stranger(stack: Stack, doors: list[Any]) -> list[dict[str, str]]:
    paths = [
        *("/", "/status", "/healthz", "/metrics", "/ui/index.html", "/debug/pprof/", "/stats/disk"),
        *("/dir/assign", "/dir/status", "/dir/lookup?volumeId=1", "/cluster/status", "/vol/status"),
        *(f"/buckets/{BUCKET}/?limit=9", f"/buckets/{BUCKET}/{KEY}", f"/buckets/{BUCKET}/{KEY}?metadata=true"),
        *(f"/{BUCKET}?list-type=2", f"/{BUCKET}/{KEY}", *(f"/{each}" for each in stack.file_ids)),
    ]
    directory = f"/buckets/{BUCKET}/{KEY}".rpartition("/")[0].encode()
    message = base64.b64encode(b"\x0a" + bytes([len(directory)]) + directory).decode()
    calls = [
        ["/filer_pb.SeaweedFiler/ListEntries", message],
        ["/filer_pb.SeaweedFiler/GetFilerConfiguration", ""],
        ["/master_pb.Seaweed/VolumeList", ""],
        ["/volume_server_pb.VolumeServer/VolumeServerStatus", ""],
        ["/messaging_pb.SeaweedS3IamCache/PutIdentity", ""],
    ]
    done = subprocess.run(
        [sys.executable, strangers.__file__],
        input=json.dumps({"doors": doors, "paths": paths, "calls": calls}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers: list[dict[str, str]] = json.loads(done.stdout)
    return answers


def gives(answer: dict[str, str]) -> bool:
    """Return whether an answer holds anything: a message, or a success with a body."""
    head, _, body = answer["answer"].partition("\r\n\r\n")
    if answer["asked"].startswith("gRPC"):
        return bool(answer["answer"])
    return re.match(r"HTTP/1\.[01] 2", head) is not None and bool(body)


def is_for_any_page(answer: dict[str, str]) -> bool:
    head = answer["answer"].partition("\r\n\r\n")[0].lower()
    return f"access-control-allow-origin: {strangers.ORIGIN}" in head or "access-control-allow-origin: *" in head


def test_the_walk_finds_all_that_listens(stack: Stack) -> None:
    ports = [door for door in stack.doors if isinstance(door, list)]
    # PostgreSQL, Redis, the API, and the five servers of SeaweedFS with two listeners each.
    assert len(ports) >= 13
    assert {host for host, _ in ports} == {"127.0.0.1"}
    assert stack.file_ids


def test_no_door_gives_anything_to_a_stranger_or_to_a_web_page(stack: Stack) -> None:
    answers = ask_as_a_stranger(stack, stack.doors)
    assert [(each["door"], each["asked"], each["answer"][:200]) for each in answers if gives(each)] == []
    # The S3 gateway lets every page read that it refused what it has no route for, and no more.
    assert [each for each in answers if is_for_any_page(each) and each["asked"].startswith(f"GET /{BUCKET}")] == []
    assert list(stack.store.list_keys("tenants/")) == [KEY]
    assert b"".join(stack.store.get_stream(KEY)) == ROWS


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_unix_socket_is_closed_to_another_user(stack: Stack) -> None:
    paths = [door for door in stack.doors if isinstance(door, str)]
    assert paths
    answers = ask_as_a_stranger(stack, paths)
    assert {each["answer"] for each in answers} == {""}
