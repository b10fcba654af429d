"""`python -m tests.deploy.dashboard`: runs every query of the dashboard on a real run and draws the results.

The local stack runs jobs, refusals and a lost trainer, while a real Prometheus scrapes its management ports. A query
without a result is an error, except for those that need a GPU. matplotlib draws the picture, in Grafana's order.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import psutil
import yaml
from openai import OpenAI

from local.ports import free_ports
from local.processes import ChildProcess, ProcessSpec
from local.stack import LocalStack
from tests.deploy.packages import NotInstalledError, ensure_programs
from tests.e2e.lab import BASE_MODEL, base_entry
from tests.factories.tiny_bases import write_tiny_base
from tests.waiting import wait_until

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "espalier.json"
PICTURE = ROOT / "docs" / "dashboard.png"
NEEDS_A_GPU = {"MFU"}
SCRAPE_SECONDS = 1
RATE_INTERVAL = "10s"  # what Grafana would put for $__rate_interval
RUN_SECONDS = 90.0
GRID_COLUMNS = 24


@dataclass(frozen=True)
class Series:
    label: str
    times: list[float]
    values: list[float]


class Prometheus:
    """A Prometheus that scrapes the management ports of a stack."""

    def __init__(self, stack: LocalStack, directory: Path) -> None:
        (port,) = free_ports(1)
        config = directory / "prometheus.yml"
        jobs = [
            {"job_name": f"espalier-{name}", "static_configs": [{"targets": [f"127.0.0.1:{own}"]}]}
            for name, own in stack.management_ports.items()
        ]
        timing = {"scrape_interval": f"{SCRAPE_SECONDS}s", "scrape_timeout": f"{SCRAPE_SECONDS}s"}
        config.write_text(yaml.safe_dump({"global": timing, "scrape_configs": jobs}))
        argv = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        self._process = ChildProcess(ProcessSpec("prometheus", argv), directory)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60)
        self._process.wait_until(self._is_ready, timeout_seconds=60)

    def ask(self, query: str, *, since: float, until: float) -> list[Any]:
        """Return the series of a query over a range. Raises HTTPStatusError for one that Prometheus cannot read."""
        query = query.replace("$__rate_interval", RATE_INTERVAL)
        values: dict[str, str | float] = {"query": query, "start": since, "end": until, "step": SCRAPE_SECONDS}
        answer = self._client.get("/api/v1/query_range", params=values)
        answer.raise_for_status()
        return list(answer.json()["data"]["result"])

    def stop(self) -> None:
        self._client.close()
        self._process.stop()

    def _is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").is_success
        except httpx.TransportError:
            return False


def read_panels() -> list[dict[str, Any]]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [panel for panel in panels if panel["type"] != "row"]


@contextmanager
def running_stack(directory: Path) -> Iterator[LocalStack]:
    registry = directory / "registry.yaml"
    entry = base_entry(write_tiny_base(directory / "base"))
    registry.write_text(yaml.safe_dump({"base_models": [entry]}))
    env = {"ESPALIER_API_PROCESSES": "2", "ESPALIER_HEARTBEAT_SECONDS": "0.5", "ESPALIER_TRAINER_THREADS": "1"}
    with LocalStack(
        directory / "data", registry_path=registry, env=env, is_durable=False, has_management_ports=True
    ) as stack:
        yield stack


def work(stack: LocalStack) -> None:
    """Let three tenants submit for a while, be refused now and then, follow a job, and lose a trainer once."""
    api_keys = [stack.create_tenant(slug) for slug in ("acme", "globex", "initech")]
    clients = [OpenAI(base_url=f"{stack.api_url}/v1", api_key=each, max_retries=0) for each in api_keys]
    first_ids = [(client, submit(client, n_epochs=2)) for client in clients]
    wait_until(lambda: all(has_ended(client, job_id) for client, job_id in first_ids), what="the first jobs")
    deadline, has_lost = time.monotonic() + RUN_SECONDS, False
    while time.monotonic() < deadline:
        for client in clients:
            submit(client, n_epochs=3)
            client.models.list()
            httpx.get(f"{stack.api_url}/v1/no-such-page", trust_env=False, timeout=60)
        if not has_lost and time.monotonic() > deadline - RUN_SECONDS / 2:
            has_lost = lose_trainer(stack)
        time.sleep(10)


def submit(client: OpenAI, *, n_epochs: int) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(24)
    ]
    file = client.files.create(file=("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=file.id,
        validation_file=file.id,
        hyperparameters={"n_epochs": n_epochs, "batch_size": 4},
    ).id


def has_ended(client: OpenAI, job_id: str) -> bool:
    return client.fine_tuning.jobs.retrieve(job_id).status in ("succeeded", "failed", "cancelled")


def lose_trainer(stack: LocalStack) -> bool:
    for child in psutil.Process(stack.process("worker").pid).children(recursive=True):
        if "worker.trainer" in child.cmdline():
            child.kill()
            return True
    return False


def read_series(answer: list[Any], legend: str) -> Iterator[Series]:
    for each in answer:
        label = legend
        for name, value in each["metric"].items():
            label = label.replace("{{" + name + "}}", value)
        pairs = [(float(at), float(value)) for at, value in each["values"]]
        yield Series(label, [at for at, _ in pairs], [value for _, value in pairs])


def ask_panels(prometheus: Prometheus, *, since: float, until: float) -> tuple[dict[int, list[Series]], list[str]]:
    """Return the series of each panel by its id, and what is wrong: the queries that answer nothing."""
    found: dict[int, list[Series]] = {}
    faults: list[str] = []
    for panel in read_panels():
        for target in panel["targets"]:
            answer = prometheus.ask(target["expr"], since=since, until=until)
            series = list(read_series(answer, target["legendFormat"]))
            numbers = [value for each in series for value in each.values if value == value]  # noqa: PLR0124 (not NaN)
            if not numbers and panel["title"] not in NEEDS_A_GPU:
                faults.append(f"{panel['title']}: {target['expr']} answers nothing")
            found.setdefault(panel["id"], []).extend(series)
    return found, faults


def draw(found: dict[int, list[Series]], *, since: float) -> None:
    """Draw the panels where Grafana would put them."""
    panels = read_panels()
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(20, height * 0.36), dpi=80, facecolor="white")
    for panel in panels:
        at = panel["gridPos"]
        left, bottom = at["x"] / GRID_COLUMNS, 1 - (at["y"] + at["h"]) / height
        box = (left + 0.03, bottom + 0.35 / height * 2, at["w"] / GRID_COLUMNS - 0.04, (at["h"] - 2) / height)
        axes = figure.add_axes(box)
        axes.set_title(panel["title"], fontsize=9, loc="left")
        (draw_number if panel["type"] == "stat" else draw_lines)(axes, panel, found[panel["id"]], since)
    figure.savefig(PICTURE)


def draw_number(axes: Any, panel: dict[str, Any], series: list[Series], _since: float) -> None:
    axes.axis("off")
    last = series[0].values[-1] if series else float("nan")
    shown = f"{last:.0%}" if panel["fieldConfig"]["defaults"]["unit"] == "percentunit" else f"{last:.3g}"
    axes.text(0.05, 0.3, shown, fontsize=22, color="tab:green")


def draw_lines(axes: Any, panel: dict[str, Any], series: list[Series], since: float) -> None:
    for each in series:
        axes.plot([at - since for at in each.times], each.values, label=each.label, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if not series:
        axes.text(0.3, 0.5, "needs a GPU whose peak is known", fontsize=8, transform=axes.transAxes)
    elif panel["id"]:
        axes.legend(fontsize=6, loc="upper left")


def main() -> int:
    try:
        ensure_programs(("prometheus",), packages=("prometheus",))
    except NotInstalledError as error:
        print(f"No panel was asked: {error}.")
        return 0
    with tempfile.TemporaryDirectory() as scratch, running_stack(Path(scratch)) as stack:
        since = time.time()
        prometheus = Prometheus(stack, Path(scratch))
        try:
            work(stack)
            found, faults = ask_panels(prometheus, since=since, until=time.time())
        finally:
            prometheus.stop()
    draw(found, since=since)
    num_queries = sum(len(panel["targets"]) for panel in read_panels())
    print("\n".join(faults) or f"{num_queries} queries of {len(found)} panels answered; drawn to {PICTURE.name}.")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
