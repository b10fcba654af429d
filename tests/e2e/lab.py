"""The whole service with real processes behind proxies that break, and workers that a test starts, kills and counts."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from openai import OpenAI

from core.storage import S3ObjectStore
from local.processes import ChildProcess
from local.stack import LocalStack
from tests.e2e.lab_rows import LabRows
from tests.faults import FaultyServers
from tests.waiting import PATIENCE_SECONDS, wait_until

BASE_MODEL = "acme-labs/tiny-llama"
ENDED = ("succeeded", "failed", "cancelled")
LEASE_SECONDS = 15.0  # a sound worker on a busy machine is silent for seconds, and must not be fenced
LONG: dict[str, Any] = {"n_epochs": 4, "num_rows": 80}  # 80 steps, 20 an epoch
SETTINGS = {
    "ESPALIER_LEASE_SECONDS": str(LEASE_SECONDS),
    "ESPALIER_HEARTBEAT_SECONDS": "0.4",
    "ESPALIER_REAP_INTERVAL_SECONDS": "0.3",
    "ESPALIER_TRAINER_THREADS": "1",
    "ESPALIER_RESUME_STEPS": "5",
    "ESPALIER_RESUME_SECONDS": "1000",
    "ESPALIER_GRACE_SECONDS": "60",
    "ESPALIER_STORAGE_PATIENCE_SECONDS": "4",
    "ESPALIER_STALL_SECONDS": "60",
}


def base_entry(directory: Path) -> dict[str, Any]:
    """The tiny base's line in a registry."""
    return {
        "id": BASE_MODEL,
        "source": {"kind": "path", "location": str(directory)},
        "dtype": "float32",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "max_seq_len": 256,
        "slots": 4,
        "max_tokens_per_step": 512,
    }


class Lab:
    """A running service whose workers are the test's own."""

    def __init__(self, stack: LocalStack, servers: FaultyServers, directory: Path) -> None:
        self.stack, self.servers = stack, servers
        self._directory = directory
        self._spec = stack.process("worker").spec
        stack.process("worker").stop()
        self._workers: list[ChildProcess] = []
        self.store = S3ObjectStore(servers.direct.storage)
        self.api_key = stack.create_tenant("acme")
        self.client = OpenAI(base_url=f"{stack.api_url}/v1", api_key=self.api_key, max_retries=0)
        self.rows = LabRows(servers)

    def start_worker(self, *, inside: Sequence[str] = (), **env: str) -> ChildProcess:
        """Start a worker; `inside` is the program, with its arguments, that starts it in turn."""
        name = f"worker-{len(self._workers)}"
        spec = replace(self._spec, name=name, argv=[*inside, *self._spec.argv], env=self._env_of(name) | env)
        worker = ChildProcess(spec, self._directory)
        self._workers.append(worker)
        return worker

    def _env_of(self, name: str) -> dict[str, str]:
        return {**self._spec.env, "ESPALIER_WORKER_NAME": name, "ESPALIER_MANAGEMENT_PORT": "0"}

    def ensure_worker(self) -> ChildProcess:
        """Return the only worker there is, one that a test gave nothing of its own; started if none lives."""
        sound = [worker for worker in self.workers if worker.spec.env == self._env_of(worker.spec.name)][:1]
        for worker in self.workers:
            if worker not in sound:
                worker.kill()
        return sound[0] if sound else self.start_worker()

    @staticmethod
    def told_by(process: ChildProcess, event: str) -> list[dict[str, Any]]:
        """Return the lines of a process's log that tell of an event."""
        lines = [json.loads(line) for line in process.log_path.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    @property
    def workers(self) -> list[ChildProcess]:
        return [worker for worker in self._workers if worker.is_alive]

    @contextmanager
    def as_tenant(self, slug: str) -> Iterator[None]:
        """Let another tenant be the one who submits and asks, within this block."""
        acme = self.api_key, self.client
        self.api_key = self.stack.create_tenant(slug)
        self.client = OpenAI(base_url=f"{self.stack.api_url}/v1", api_key=self.api_key, max_retries=0)
        try:
            yield
        finally:
            self.cancel_all()
            self.client.close()
            self.api_key, self.client = acme

    def cancel_all(self) -> None:
        """Leave no job to the next test."""
        for job in self.client.fine_tuning.jobs.list(limit=50):
            if job.status not in ENDED:
                self.post(job.id, "cancel")

    def close(self) -> None:
        self.kill_workers()
        self.client.close()
        self.rows.close()

    def kill_workers(self) -> None:
        """Leave nobody to claim what is submitted next."""
        for worker in self.workers:
            worker.kill()

    @staticmethod
    def trainer_of(worker: ChildProcess) -> psutil.Process:
        def is_trainer(child: psutil.Process) -> bool:
            try:
                return "worker.trainer" in child.cmdline()
            except psutil.NoSuchProcess:  # a zombie among them: another child that has just ended
                return False

        def trainers() -> list[psutil.Process]:
            return [child for child in psutil.Process(worker.pid).children(recursive=True) if is_trainer(child)]

        wait_until(lambda: bool(trainers()), what="a trainer")
        return trainers()[0]

    def submit(
        self,
        *,
        n_epochs: int = 2,
        num_rows: int = 12,
        batch_size: int = 4,
        lines: list[dict[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        lines = lines or [
            {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
            for n in range(num_rows)
        ]
        content = "\n".join(json.dumps(line) for line in lines).encode()
        file = self.client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        return self.client.fine_tuning.jobs.create(
            model=BASE_MODEL,
            training_file=file.id,
            validation_file=file.id if extra.pop("validation", False) else None,
            hyperparameters={"n_epochs": n_epochs, "batch_size": batch_size},
            seed=extra.pop("seed", 7),
            extra_body={"learning_rate": 0.001, **extra},
        ).id

    def job(self, job_id: str) -> Any:
        return self.client.fine_tuning.jobs.retrieve(job_id)

    def post(self, job_id: str, verb: str) -> httpx.Response:
        url = f"{self.stack.api_url}/v1/fine_tuning/jobs/{job_id}/{verb}"
        return httpx.post(
            url, headers={"authorization": f"Bearer {self.api_key}"}, timeout=PATIENCE_SECONDS, trust_env=False
        )

    def get(self, job_id: str) -> httpx.Response:
        url = f"{self.stack.api_url}/v1/fine_tuning/jobs/{job_id}"
        return httpx.get(
            url, headers={"authorization": f"Bearer {self.api_key}"}, timeout=PATIENCE_SECONDS, trust_env=False
        )

    def wait_for_status(self, job_id: str, *statuses: str) -> Any:
        query = "select status from jobs where id = %s"  # not over the wire, which costs the machine a third of a core
        wait_until(lambda: self.rows.sql(query, job_id)[0][0] in statuses, what=f"{job_id} {statuses}")
        return self.job(job_id)

    def wait_for_end(self, job_id: str) -> Any:
        return self.wait_for_status(job_id, *ENDED)

    def succeed(self, job_id: str) -> str:
        """Wait for the job's success and return the SHA-256 of its weights."""
        job = self.wait_for_end(job_id)
        assert job.status == "succeeded", (job.error, self.rows.messages(job_id))
        assert self.rows.messages(job_id).count("The job has successfully completed.") == 1
        ((files,),) = self.rows.sql("select files from adapters where job_id = %s", job_id)
        (weights,) = (file["sha256"] for file in files if file["name"] == "adapter_model.safetensors")
        return str(weights)


@contextmanager
def running_lab(base_dir: Path, directory: Path, *, max_tokens_per_step: int = 512, **env: str) -> Iterator[Lab]:
    # Its rank, so that a job can be larger than any device.
    entry = base_entry(base_dir) | {"max_rank": 2**24, "max_tokens_per_step": max_tokens_per_step}
    entry["quantizations"] = ["nf4"]
    registry = directory / "registry.yaml"
    registry.write_text(yaml.safe_dump({"base_models": [entry]}))
    servers = FaultyServers(directory / "data")
    with ExitStack() as exits:
        stack = exits.enter_context(
            LocalStack(directory / "data", registry_path=registry, env={**SETTINGS, **env}, servers=servers)
        )
        lab = Lab(stack, servers, directory)
        exits.callback(lab.close)
        yield lab


def is_running(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def stop_process(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def continue_process(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)
