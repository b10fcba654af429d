"""The whole service with real processes behind proxies that break, and workers that a test starts, kills and counts."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import yaml
from openai import OpenAI

from core.storage import S3ObjectStore
from local.processes import ChildProcess
from local.stack import LocalStack
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
        self._connection = psycopg.connect(servers.direct.postgres_url, autocommit=True)

    def start_worker(self, **env: str) -> ChildProcess:
        name = f"worker-{len(self._workers)}"
        spec = replace(self._spec, name=name, env=self._env_of(name) | env)
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
        self._connection.close()

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

    @contextmanager
    def claims_held(self) -> Iterator[None]:
        """Let nobody claim a job of the tenant within this block, by its quota."""
        self._connection.execute("update tenants set max_running = 0")
        try:
            yield
        finally:
            self._connection.execute("update tenants set max_running = default")

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

    def messages(self, job_id: str) -> list[str]:
        return [
            message for (message,) in self.sql("select message from events where job_id = %s order by number", job_id)
        ]

    def has_said(self, job_id: str, start: str) -> bool:
        return any(message.startswith(start) for message in self.messages(job_id))

    def wait_for_step(self, job_id: str, step: int) -> None:
        wait_until(
            lambda: self.sql("select trained_steps from jobs where id = %s", job_id)[0][0] >= step, what=f"step {step}"
        )

    def wait_for_resume_point(self, job_id: str) -> int:
        query = "select max(step) from resume_points where job_id = %s"
        wait_until(lambda: self.sql(query, job_id)[0][0] is not None, what="a resume point")
        return int(self.sql(query, job_id)[0][0])

    def wait_for_status(self, job_id: str, *statuses: str) -> Any:
        query = "select status from jobs where id = %s"  # not over the wire, which costs the machine a third of a core
        wait_until(lambda: self.sql(query, job_id)[0][0] in statuses, what=f"{job_id} {statuses}")
        return self.job(job_id)

    def wait_for_end(self, job_id: str) -> Any:
        return self.wait_for_status(job_id, *ENDED)

    def succeed(self, job_id: str) -> str:
        """Wait for the job's success and return the SHA-256 of its weights."""
        job = self.wait_for_end(job_id)
        assert job.status == "succeeded", (job.error, self.messages(job_id))
        assert self.messages(job_id).count("The job has successfully completed.") == 1
        ((files,),) = self.sql("select files from adapters where job_id = %s", job_id)
        (weights,) = (file["sha256"] for file in files if file["name"] == "adapter_model.safetensors")
        return str(weights)

    def outcomes(self, job_id: str) -> list[str]:
        return [
            row[0] for row in self.sql("select outcome from attempts where job_id = %s order by lease_token", job_id)
        ]

    def seconds_until_device_was_free(self, job_id: str) -> float:
        """Wait until a cancelled job's trainer has reported that it left, and return how long after its end it did."""
        query = "select extract(epoch from left_device_at - ended_at) from attempts where job_id = %s"
        wait_until(lambda: self.sql(query, job_id)[0][0] is not None, what="a free device")
        return float(self.sql(query, job_id)[0][0])

    def lease_end(self, job_id: str) -> dt.datetime:
        """Return when the job's lease is over, by the database's clock."""
        ((lease_until,),) = self.sql("select lease_until from jobs where id = %s", job_id)
        assert lease_until is not None, "nobody holds the job"
        return lease_until  # type: ignore[no-any-return]

    def wait_for_instant(self, instant: dt.datetime) -> None:
        """Wait until it is over, by the clock that decides about leases."""
        now = "select clock_timestamp() from jobs limit 1"
        wait_until(lambda: self._connection.execute(now).fetchone()[0] > instant, what=str(instant))  # type: ignore[index]

    def attempt_end(self, job_id: str) -> dt.datetime:
        """Return when the job's first attempt ended, by the database's clock."""
        query = "select ended_at from attempts where job_id = %s order by lease_token limit 1"
        return self.sql(query, job_id)[0][0]  # type: ignore[no-any-return]

    def attempt_count(self, job_id: str) -> int:
        return int(self.sql("select attempt_count from jobs where id = %s", job_id)[0][0])

    def limit_attempts(self, job_id: str, number: int) -> None:
        self.sql(f"update jobs set max_attempts = {number} where id = %s returning 1", job_id)

    def metric_steps(self, job_id: str) -> list[int]:
        return [row[0] for row in self.sql("select step from metrics where job_id = %s order by step", job_id)]

    def sql(self, query: str, job_id: str) -> list[Any]:
        values = (job_id.removeprefix("ftjob-"),)
        try:
            return self._connection.execute(query, values).fetchall()
        except psycopg.OperationalError:  # the server was restarted since, and may be on its way back
            wait_until(self._has_reconnected, what="the database")
            return self._connection.execute(query, values).fetchall()

    def _has_reconnected(self) -> bool:
        try:
            self._connection = psycopg.connect(self.servers.direct.postgres_url, autocommit=True)
        except psycopg.OperationalError:
            return False
        return True


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
