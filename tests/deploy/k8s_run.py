"""`make run-k8s`: the rendered pods executed under Docker, and a job trained, drained and finished through them.

A separate installation is rendered: the overlay keda, the component weights-pvc and k8s/servers, with its own registry
and store. Its pods run as in k8s_node. The servers' images are stand-ins (tests/deploy/standins) under the names in the
manifests. KEDA itself is missing: its query is sent as KEDA would send it, with KEDA's login.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import yaml
from openai import OpenAI

from tests.deploy.checkup import examine
from tests.deploy.compose import build_standins
from tests.deploy.engine import Engine
from tests.deploy.images import build_all, image_name
from tests.deploy.k8s_node import Node, RunningPod
from tests.deploy.k8s_render import K8S, Object, Pod, find_kubectl, list_pods, of_kind
from tests.e2e.lab import base_entry
from tests.factories.tiny_bases import write_tiny_base
from tests.waiting import wait_until

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
IDLE_SECONDS = 20
NUM_EPOCHS, NUM_ROWS, BATCH_SIZE = 50, 60, 4
_STANDINS = {"postgresql": "postgres", "redis": "redis", "s3": "s3"}
_IDLE_EXIT = "/spec/jobTargetRef/template/spec/containers/0/env/9"  # where Kustomize puts it
_SETTINGS = ("ESPALIER_S3_ENDPOINT=espalier-dev-s3:9000", "ESPALIER_S3_SECURE=false")


def check(engine: Engine) -> None:
    build_all(engine)
    build_standins(engine)
    with tempfile.TemporaryDirectory(dir=engine.directory) as place:
        Path(place).chmod(0o755)
        run(engine, Path(place))


def run(engine: Engine, place: Path) -> None:
    node = prepare(engine, place)
    engine.docker("network", "create", node.network)
    try:
        use(Cluster(node))
    except BaseException:
        print(*(pod.log() for pod in node.pods), sep="\n")
        raise
    finally:
        for pod in node.pods:
            pod.remove()
        engine.try_docker("network", "rm", node.network)


def prepare(engine: Engine, place: Path) -> Node:
    """Render the installation, make its secrets, and give the images the names that it names."""
    weights = write_tiny_base(place / "weights" / "tiny")
    for path in (weights.parent, weights, *weights.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    objects = render_installation(place / "installation")
    for image in {container["image"] for pod in list_pods(objects) for container in pod.containers}:
        name = image.partition(":")[0].rpartition("/")[2]
        ours = f"standin-{_standin_of(image, objects)}"
        engine.docker("tag", image_name(name.removeprefix("espalier-")) if "espalier-" in name else ours, image)
    printed = subprocess.run([K8S / "make-secrets.sh", "--dev"], capture_output=True, text=True, check=True).stdout
    secrets = {each["metadata"]["name"]: each["stringData"] for each in yaml.safe_load_all(printed) if each}
    return Node(engine, objects, secrets, {"espalier-weights": weights.parent}, place / "pods")


def _standin_of(image: str, objects: list[Object]) -> str:
    servers = {each["image"]: pod.name for pod in list_pods(objects) for each in pod.containers}
    return _STANDINS.get(servers[image].removeprefix("espalier-dev-"), "")


def render_installation(directory: Path) -> list[Object]:
    """Write what an operator writes, in two layers as the documentation says, and render it."""
    entry = base_entry(Path("/models/tiny")) | {"id": BASE, "quantizations": ["nf4"]}
    own, composed = directory, directory.with_name("composed")
    for each in (composed, own):
        each.mkdir()
    (own / "registry.yaml").write_text(yaml.safe_dump({"base_models": [entry]}), encoding="utf-8")
    _write_layer(
        composed,
        resources=[_relative(composed, "overlays/keda"), _relative(composed, "servers")],
        components=[_relative(composed, f"components/{name}") for name in ("weights-pvc", "images")],
    )
    named = {"op": "test", "path": f"{_IDLE_EXIT}/name", "value": "ESPALIER_IDLE_EXIT_SECONDS"}
    idle = {"op": "replace", "path": f"{_IDLE_EXIT}/value", "value": str(IDLE_SECONDS)}
    _write_layer(
        own,
        namespace="espalier",
        resources=["../composed"],
        configMapGenerator=[
            {"name": "espalier-settings", "behavior": "merge", "literals": list(_SETTINGS)},
            {"name": "espalier-registry", "behavior": "merge", "files": ["registry.yaml"]},
        ],
        patches=[{"target": {"kind": "ScaledJob"}, "patch": json.dumps([named, idle])}],
    )
    done = subprocess.run([find_kubectl(), "kustomize", own], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def _write_layer(directory: Path, **fields: Any) -> None:
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")


def _relative(directory: Path, name: str) -> str:
    return os.path.relpath(K8S / name, directory.resolve())


@dataclass
class Cluster:
    """The installation on its node, and who uses it."""

    node: Node
    api_key: str = ""
    operator_key: str = ""
    api: RunningPod | None = None

    def pod(self, name: str) -> Pod:
        (found,) = (each for each in list_pods(self.node.objects) if each.name == f"espalier-{name}")
        return found

    @property
    def api_url(self) -> str:
        assert self.api is not None
        return f"http://{self.api.address}:8000"

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.api_url}/v1", api_key=self.api_key)

    def address_of(self, server: str) -> str:
        (found,) = (each for each in self.node.pods if each.pod.name == f"espalier-dev-{server}")
        return found.address

    def ask_as_keda(self) -> int:
        """Ask for the pool's demand with the query and the login that KEDA is given."""
        (trigger,) = next(
            each for each in of_kind(self.node.objects, "ScaledJob") if "none" in each["metadata"]["name"]
        )["spec"]["triggers"]
        url = self.node.secrets["espalier-scaler"]["connection"].replace(
            "espalier-dev-postgresql", self.address_of("postgresql")
        )
        with psycopg.connect(url) as connection:
            return int(connection.execute(trigger["metadata"]["query"]).fetchone()[0])  # type: ignore[index]

    def ask_by_api(self) -> int:
        url = f"{self.api_url}/admin/pools/{BASE}@none/demand"
        answer = httpx.get(url, headers={"authorization": f"Bearer {self.operator_key}"}, timeout=60, trust_env=False)
        return int(answer.raise_for_status().json()["workers_wanted"])

    def sql(self, query: str, *values: object) -> list[Any]:
        url = self.node.secrets["espalier-owner"]["owner-database-url"].replace(
            "espalier-dev-postgresql", self.address_of("postgresql")
        )
        with psycopg.connect(url) as connection:
            return connection.execute(query, values).fetchall()

    def job(self, job_id: str) -> Any:
        ((status, steps, attempts),) = self.sql(
            "select status, trained_steps, attempt_count from jobs where id = %s", job_id.removeprefix("ftjob-")
        )
        return status, steps, attempts

    def wait_for(self, is_true: Callable[[], bool], *, what: str) -> None:
        wait_until(is_true, what=what)
        doomed = [pod.name for pod in self.node.pods if pod.is_doomed]
        assert not doomed, f"a kubelet would have killed {doomed}"


def use(cluster: Cluster) -> None:
    start_servers(cluster)
    for name in ("migrate", "bucket"):
        print(f"Job {name}: status 0 after {cluster.node.run_job(cluster.pod(name)).seconds:.1f} s", flush=True)
    start_control_plane(cluster)
    give_keys(cluster)
    demand = [cluster.ask_as_keda()]
    job_id = submit(cluster)
    demand.append(cluster.ask_as_keda())
    step = drain_a_worker(cluster, job_id)
    demand.append(cluster.ask_as_keda())
    assert cluster.ask_by_api() == demand[-1]
    finish_with_the_next_worker(cluster, job_id, step)
    demand.append(cluster.ask_as_keda())
    assert demand == [0, 1, 1, 0], demand
    print(f"KEDA's query said {demand}: before the job, queued, given back, ended; the API says the same")
    roll_the_control_plane(cluster)


def start_servers(cluster: Cluster) -> None:
    for name in _STANDINS:
        started = cluster.node.start(cluster.pod(f"dev-{name}"), alias=f"espalier-dev-{name}")
        print(f"{started.name}: ready after {started.wait_until_ready():.1f} s", flush=True)


def start_control_plane(cluster: Cluster) -> None:
    cluster.api = cluster.node.start(cluster.pod("api"), alias="espalier-api")
    started = [cluster.api, *(cluster.node.start(cluster.pod("schedule")) for _ in range(2))]
    for each in started:
        print(f"{each.name}: ready after {each.wait_until_ready():.1f} s", flush=True)


def give_keys(cluster: Cluster) -> None:
    """Make a tenant and an operator's key where the documentation says: in the pod for an operator's commands."""
    shell = cluster.node.start(cluster.pod("operator"))
    keys = []
    for words in (("tenants", "create", "acme"), ("operators", "create", "keda", "--read-only")):
        said = shell.execute("espalier", *words).split()
        keys += [word for word in said if word.startswith("esp_")][:1]
    cluster.api_key, cluster.operator_key = keys
    print(f"{shell.name}: a tenant and an operator have keys; stopped in {shell.stop().seconds:.1f} s")


def submit(cluster: Cluster) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(NUM_ROWS)
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    file = cluster.client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    job = cluster.client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        hyperparameters={"n_epochs": NUM_EPOCHS, "batch_size": BATCH_SIZE},
        extra_body={"learning_rate": 0.001},
    )
    cluster.wait_for(lambda: cluster.job(job.id)[0] == "queued", what="the job in its queue")
    return job.id


def start_worker(cluster: Cluster) -> RunningPod:
    worker = cluster.node.start(cluster.pod("worker-smollm2-135m-none"))
    print(f"{worker.name}: ready after {worker.wait_until_ready():.1f} s", flush=True)
    return worker


def drain_a_worker(cluster: Cluster, job_id: str) -> int:
    """Take the worker away in the middle of the job, as a spot machine's end does, and return the step it stored."""
    worker = start_worker(cluster)
    cluster.wait_for(lambda: cluster.job(job_id)[1] >= 20, what="20 steps")
    ended = worker.stop()
    status, step, num_attempts = cluster.job(job_id)
    ((stored,),) = cluster.sql("select max(step) from resume_points where job_id = %s", job_id.removeprefix("ftjob-"))
    assert (ended.exit_code, status, num_attempts, stored) == (0, "queued", 0, step), (
        ended,
        status,
        num_attempts,
        stored,
        step,
    )
    print(
        f"{worker.name}: drained at step {step} in {ended.seconds:.1f} s, status 0; the job is queued and not charged"
    )
    return int(step)


def finish_with_the_next_worker(cluster: Cluster, job_id: str, step: int) -> None:
    shell = cluster.node.start(cluster.pod("operator"))
    worker = start_worker(cluster)
    # The name is the Service's. Its port is the pod's: there is no Service here that would lead from 80 to it.
    examine(shell.execute, unseen=("gpu",), options=("--api-url", "http://espalier-api:8000"))
    shell.stop()
    cluster.wait_for(lambda: cluster.job(job_id)[0] in ("succeeded", "failed"), what="the job's end")
    assert cluster.job(job_id)[0] == "succeeded", worker.log()
    messages = [
        message
        for (message,) in cluster.sql("select message from events where job_id = %s", job_id.removeprefix("ftjob-"))
    ]
    assert f"Resumed from step {step}." in messages
    num_bytes = download(cluster, job_id)
    ended_at = time.monotonic()
    assert worker.wait_until_ended() == 0, worker.log()
    assert not cluster.sql("select name from workers")
    seconds = time.monotonic() - ended_at
    print(
        f"{worker.name}: resumed at step {step}, trained {cluster.job(job_id)[1]}; an adapter of {num_bytes / 1e6:.1f} MB; status 0 when idle, {seconds:.0f} s later"
    )


def download(cluster: Cluster, job_id: str) -> int:
    """Fetch the adapter from the store by its signed URLs, and compare every hash. The store's name is the cluster's."""
    headers = {"authorization": f"Bearer {cluster.api_key}"}
    with httpx.Client(base_url=f"{cluster.api_url}/v1", headers=headers, timeout=300, trust_env=False) as http:
        adapters = http.get("/adapters").raise_for_status().json()["data"]
        (adapter,) = (each for each in adapters if each["fine_tuning_job_id"] == job_id)
        files = http.get(f"/adapters/{adapter['id']}/download").raise_for_status().json()["files"]
    num_bytes = 0
    for file in files:
        url = httpx.URL(file["url"])
        reached = url.copy_with(host=cluster.address_of("s3"))
        content = (
            httpx.get(reached, headers={"host": url.netloc.decode()}, timeout=300, trust_env=False)
            .raise_for_status()
            .content
        )
        assert hashlib.sha256(content).hexdigest() == file["sha256"], file["name"]
        num_bytes += len(content)
    return num_bytes


def roll_the_control_plane(cluster: Cluster) -> None:
    """Replace each process by a new one that is ready before, as a rollout does."""
    for old in [pod for pod in cluster.node.pods if pod.pod.app in ("espalier-api", "espalier-schedule")]:
        new = cluster.node.start(old.pod)
        new.wait_until_ready()
        ended = old.stop()
        assert ended.exit_code == 0, old.log()
        print(f"{old.name}: replaced; stopped in {ended.seconds:.1f} s, status 0", flush=True)
    assert not [pod.name for pod in cluster.node.pods if pod.is_doomed]
