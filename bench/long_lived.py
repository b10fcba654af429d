"""How much memory a trainer keeps of each job that has ended: `python -m bench.long_lived [--jobs N]`.

A real trainer, on a tiny base with a real tokenizer, gets short jobs one after another through its real pipes. Each job
is fetched from and stored to an object store in this process. No two jobs have the same rows or lengths, so caches fill
as with real content. After every few jobs the trainer's anonymous memory is shown; how much of the mapped files is
resident is the kernel's choice. Variables named MALLOC_... reach the trainer: MALLOC_ARENA_MAX=1 shows the allocator's
part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

from bench.workload import MODULES, command, machine
from core.domain.training import AdapterConfig, TrainingSpec
from tests.factories.tiny_bases import write_tiny_base
from worker.messages import (
    BaseInspected,
    BaseLoaded,
    JobFacts,
    JobFailed,
    JobSucceeded,
    LoadBase,
    LoadWeights,
    RemoteFile,
    StartJob,
    UrlsGranted,
    UrlsWanted,
)
from worker.supervisor.children import TrainerChild

_SHOWN_EVERY = 100
_BASE_MODEL = "tiny"
_RANKS = (4, 8, 16)
_PATIENCE_SECONDS = 60.0

R = TypeVar("R")


class Store(ThreadingHTTPServer):
    """Takes every object and keeps those that it gave itself."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _StoreRequest)
        self.objects: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def add(self, path: str, content: bytes) -> RemoteFile:
        self.objects = {f"/{path}": content}
        return RemoteFile(url=self.url(path), sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


class _StoreRequest(BaseHTTPRequestHandler):
    server: Store

    def do_GET(self) -> None:
        content = self.server.objects[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_words: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    options = parser.parse_args()
    print(f"{machine()}\n$ {command()}\n")
    with tempfile.TemporaryDirectory() as scratch, Store() as store:
        child = start_trainer(Path(scratch))
        print("| jobs | anonymous resident MB | seconds |\n|---|---|---|")
        begun = time.monotonic()
        for number in range(1, options.jobs + 1):
            train(child, store, number)
            if number % _SHOWN_EVERY == 0 or number == 1:
                print(f"| {number} | {anonymous_mb(child.pid):.1f} | {time.monotonic() - begun:.0f} |", flush=True)
        child.close()
        store.shutdown()


def anonymous_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(kib) / 2**10


def start_trainer(scratch: Path) -> TrainerChild:
    order = LoadBase(
        base_model_id=_BASE_MODEL,
        source_kind="path",
        location=str(write_tiny_base(scratch / "base")),
        revision="1",
        dtype="float32",
        quantization=None,
        target_modules=MODULES,
        chat_template=None,
        slots=4,
        max_rank=max(_RANKS),
        max_tokens_per_step=512,
        cache_dir=str(scratch / "cache"),
        resume_steps=2,
        resume_seconds=1000,
        storage_patience_seconds=5,
    )
    child = TrainerChild(order, threads=1, scratch_dir=scratch)
    wait_for(child, BaseInspected)
    child.send(LoadWeights())
    wait_for(child, BaseLoaded)
    return child


def train(child: TrainerChild, store: Store, number: int) -> None:
    child.send(make_order(store.add(f"rows-{number}", make_rows(number)), number))
    succeeded = wait_for(child, JobSucceeded, store)
    assert succeeded.lease_token == number


def make_order(training_file: RemoteFile, number: int) -> StartJob:
    rank = _RANKS[number % len(_RANKS)]
    return StartJob(
        lease_token=number,
        tenant_id=f"tenant-{number}",
        share=1.0,
        spec=TrainingSpec(
            adapter=AdapterConfig(rank=rank, alpha=2.0 * rank, target_modules=MODULES),
            n_epochs=2,
            batch_size=2,
            learning_rate=1e-3,
            max_seq_len=256,
            seed=number,
        ),
        facts=JobFacts(
            job_id=f"ftjob-{number}",
            tenant=f"tenant-{number}",
            model_name=f"ft:tiny:tenant-{number}::1",
            base_model_id=_BASE_MODEL,
            base_revision="",
            quantization=None,
            created_at=number,
        ),
        training_file=training_file,
        validation_file=training_file,
    )


def make_rows(number: int) -> bytes:
    """Return four conversations whose words and lengths are this job's own."""
    draw = random.Random(number)
    rows = []
    for _ in range(4):
        said = [" ".join(f"w{draw.randrange(10**6)}" for _ in range(draw.randint(2, 12))) for _ in range(2)]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
        rows.append(json.dumps({"messages": turns}))
    return "\n".join(rows).encode()


def wait_for(child: TrainerChild, kind: type[R], store: Store | None = None) -> R:
    """Return the next report of a kind, and grant the uploads that are asked for before it."""
    while True:
        report = child.receive(timeout_seconds=_PATIENCE_SECONDS)
        assert report is not None, "the trainer says nothing"
        assert not isinstance(report, JobFailed), report
        if isinstance(report, UrlsWanted) and store is not None:
            urls = {name: store.url(f"{report.artifact}/{name}") for name in report.names}
            child.send(UrlsGranted(lease_token=report.lease_token, artifact=report.artifact, urls=urls))
        if isinstance(report, kind):
            return report


if __name__ == "__main__":
    main()
