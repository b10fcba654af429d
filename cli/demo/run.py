"""Runs the demo: the stack, three jobs of two tenants, their progress, their adapters, the answers before and after."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from cli.demo.documentation import Documentation, build_documentation
from core.sandbox import plain_environment
from local.stack import LocalStack

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ACME_MODULES = ("itertools", "functools", "statistics", "collections", "heapq", "bisect", "textwrap", "random")
GLOBEX_MODULES = ("shutil", "tempfile", "glob", "zipfile", "inspect", "fnmatch", "filecmp", "csv")
_ENDED = ("succeeded", "failed", "cancelled")
_POLL_SECONDS = 1.0


@dataclass
class DemoJob:
    """One job of the demo, followed through its events."""

    title: str
    client: OpenAI
    api_key: str
    documentation: Documentation
    options: dict[str, Any]
    job_id: str = ""
    status: str = "queued"  # as on the wire
    valid_losses: list[float] = field(default_factory=list)
    directory: Path = Path()

    @property
    def facts(self) -> dict[str, Any]:
        """The job's result, for programs."""
        named = ("title", "job_id", "status", "valid_losses")
        return {name: getattr(self, name) for name in named} | {"directory": str(self.directory)}


def run_demo(data_dir: Path, *, is_quick: bool, console: Console) -> tuple[DemoJob, ...]:
    """Run the whole demo and return its jobs. Raises RuntimeError with the path of the logs if a job fails."""
    started = time.monotonic()
    console.print("[bold]Starting PostgreSQL, Redis, S3, the API, one worker and the schedule ...[/]")
    with LocalStack(data_dir) as stack:
        console.print(f"The API answers at {stack.api_url}/v1 after {time.monotonic() - started:.1f} s.\n")
        jobs = _make_jobs(stack, is_quick=is_quick)
        for job in jobs:
            _submit(job, is_quick=is_quick)
            console.print(f"Submitted {job.title}: {job.job_id}")
        _follow(jobs, console)
        failed = [job for job in jobs if job.status != "succeeded"]
        if failed:
            raise RuntimeError(f"{failed[0].title} has {failed[0].status}; see {stack.data_dir}/logs/worker.log.")
        _print_losses(jobs, console)
        for job in jobs:
            _download(job, stack)
        console.print("\nPlain transformers and PEFT now load each adapter and answer ...")
        _print_answers(jobs, _ask(jobs, stack), console)
        for job in jobs:
            console.print(f"{job.title}: {escape(str(job.directory))}")
    console.print(f"\nDone in {time.monotonic() - started:.0f} s.")
    return jobs


def _make_jobs(stack: LocalStack, *, is_quick: bool) -> tuple[DemoJob, ...]:
    num_facts = 8 if is_quick else 24
    acme = build_documentation(ACME_MODULES, num_facts=num_facts)
    globex = build_documentation(GLOBEX_MODULES, num_facts=num_facts)
    acme_key, globex_key = stack.create_tenant("acme"), stack.create_tenant("globex")

    def job(title: str, api_key: str, documentation: Documentation, **options: Any) -> DemoJob:
        client = OpenAI(base_url=f"{stack.api_url}/v1", api_key=api_key)
        return DemoJob(title, client, api_key, documentation, options)

    return (
        job("acme LoRA", acme_key, acme),
        job("globex LoRA", globex_key, globex),
        job("acme QLoRA (NF4)", acme_key, acme, quantization="nf4"),
    )


def _submit(job: DemoJob, *, is_quick: bool) -> None:
    training = job.client.files.create(file=("documentation.jsonl", job.documentation.training), purpose="fine-tune")
    validation = job.client.files.create(file=("questions.jsonl", job.documentation.validation), purpose="fine-tune")
    created = job.client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=training.id,
        validation_file=validation.id,
        suffix="stdlib",
        seed=7,
        hyperparameters={"n_epochs": 4 if is_quick else 5, "batch_size": 8},
        extra_body={"learning_rate": 1e-3, **job.options},
    )
    job.job_id = created.id


def _follow(jobs: Sequence[DemoJob], console: Console) -> None:
    columns = (
        TextColumn("{task.description:18}"),
        BarColumn(),
        TextColumn("{task.completed:>3.0f}/{task.total:.0f} steps  {task.fields[facts]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        bars = {job.job_id: progress.add_task(job.title, total=1, facts="queued") for job in jobs}
        while any(job.status not in _ENDED for job in jobs):
            for job in jobs:
                if job.status not in _ENDED:
                    _refresh(job, progress, bars[job.job_id])
            time.sleep(_POLL_SECONDS)


def _refresh(job: DemoJob, progress: Progress, bar: TaskID) -> None:
    state = job.client.fine_tuning.jobs.retrieve(job.job_id)
    extra: dict[str, Any] = state.model_extra or {}
    events = list(job.client.fine_tuning.jobs.list_events(job.job_id, limit=100).data)
    steps = [event for event in events if isinstance(event.data, dict) and "train_loss" in event.data]
    facts: str = state.status
    if steps:
        facts = _describe(steps, state.estimated_finish)
    job.valid_losses = [
        event.data["full_valid_loss"]
        for event in reversed(events)
        if isinstance(event.data, dict) and "full_valid_loss" in event.data
    ]
    job.status = state.status
    shown = "done" if state.status == "succeeded" else facts
    progress.update(bar, total=extra["total_steps"], completed=extra["trained_steps"], facts=shown)
    if not progress.console.is_terminal:
        progress.console.print(f"{job.title:18} {extra['trained_steps']}/{extra['total_steps']} steps  {facts}")


def _describe(steps: Sequence[Any], estimated_finish: int | None) -> str:
    """Return loss, tokens per second and ETA from step events, newest first."""
    seconds = max(1, steps[0].created_at - steps[-1].created_at)
    num_tokens = sum(step.data["num_tokens"] for step in steps[:-1])
    eta = f"{max(0, estimated_finish - int(time.time()))} s" if estimated_finish else "-"
    return f"loss {steps[0].data['train_loss']:.3f}  {num_tokens / seconds:4.0f} tok/s  ETA {eta}"


def _print_losses(jobs: Sequence[DemoJob], console: Console) -> None:
    table = Table(title="Validation loss (the same facts, asked in other words)")
    for heading in ("job", "after epoch 1", "at the end"):
        table.add_column(heading)
    for job in jobs:
        table.add_row(job.title, f"{job.valid_losses[0]:.3f}", f"{job.valid_losses[-1]:.3f}")
    console.print(table)


def _download(job: DemoJob, stack: LocalStack) -> None:
    with httpx.Client(
        base_url=f"{stack.api_url}/v1", headers={"authorization": f"Bearer {job.api_key}"}, timeout=60, trust_env=False
    ) as http:
        adapters = http.get("/adapters", params={"limit": 100}).raise_for_status().json()["data"]
        adapter = next(adapter for adapter in adapters if adapter["fine_tuning_job_id"] == job.job_id)
        files = http.get(f"/adapters/{adapter['id']}/download").raise_for_status().json()["files"]
    job.directory = stack.data_dir / "adapters" / job.job_id
    job.directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        content = httpx.get(file["url"], timeout=60, trust_env=False).raise_for_status().content
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise RuntimeError(f"{file['name']} of {job.title} arrived damaged.")
        (job.directory / file["name"]).write_bytes(content)


def _ask(jobs: Sequence[DemoJob], stack: LocalStack) -> list[dict[str, list[str]]]:
    (base_dir,) = (stack.data_dir / "cache" / "bases").glob("gguf-*")
    adapters = [{"directory": str(job.directory), "questions": job.documentation.questions} for job in jobs]
    done = subprocess.run(
        [sys.executable, "-m", "cli.demo.answers"],
        env=plain_environment(),
        input=json.dumps({"base_dir": str(base_dir), "adapters": adapters}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"The adapters could not be tried:\n{done.stderr[-2000:]}")
    answers: list[dict[str, list[str]]] = json.loads(done.stdout)
    return answers


def _print_answers(jobs: Sequence[DemoJob], answers: Sequence[dict[str, list[str]]], console: Console) -> None:
    table = Table(title="Answers before and after", show_lines=True)
    for heading in ("job", "question", "base model", "with its adapter", "documentation"):
        table.add_column(heading, overflow="fold")
    for job, answer in zip(jobs, answers, strict=True):
        rows = zip(
            job.documentation.questions, answer["before"], answer["after"], job.documentation.answers, strict=True
        )
        for question, before, after, truth in rows:
            table.add_row(job.title, *map(escape, (question, before, after, truth)))
    console.print(table)
