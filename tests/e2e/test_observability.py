"""What the service reports about itself during real work: logs, metrics and traces of one run of the local stack."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from local.stack import LocalStack
from tests.e2e.collector import Collector, Span
from tests.e2e.lab import BASE_MODEL, base_entry
from tests.waiting import PATIENCE_SECONDS, wait_until

DOCS = Path(__file__).resolve().parents[2] / "docs" / "observability.md"
SECRET_WORD = "marzipan"  # stands in every row, and may stand in no log, figure or span
PHASES = ("claim", "load", "train", "evaluate", "export", "upload")
# Not seen where there is no GPU whose peak is known.
UNSEEN = {"espalier_device_peak_flops"}


@dataclass(frozen=True)
class Run:
    """What was left of a run, by the names of its processes."""

    lines: dict[str, list[str]]
    probes: dict[str, str]
    families: dict[str, set[str]]
    pages: dict[str, str]
    spans: list[Span]
    job_id: str
    other_job_id: str
    secrets: tuple[str, ...]

    @property
    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for lines in self.lines.values() for line in lines]


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A job that succeeds, one whose trainer is killed, requests that are refused; then everything is stopped."""
    directory = tmp_path_factory.mktemp("observed")
    registry = directory / "registry.yaml"
    registry.write_text(yaml.safe_dump({"base_models": [base_entry(tiny_base)]}))
    with closing(Collector()) as collector:
        env = {
            "ESPALIER_API_PROCESSES": "2",
            "ESPALIER_OTLP_ENDPOINT": collector.url,
            "ESPALIER_HEARTBEAT_SECONDS": "0.5",
            "ESPALIER_TRAINER_THREADS": "1",
        }
        with LocalStack(
            directory / "data", registry_path=registry, env=env, is_durable=False, has_management_ports=True
        ) as stack:
            api_key = stack.create_tenant("acme")
            with OpenAI(base_url=f"{stack.api_url}/v1", api_key=api_key, max_retries=0) as client:
                job_id = submit(client, n_epochs=2)
                wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "succeeded", what="success")
                other_job_id = submit(client, n_epochs=20)
                lose_trainer(stack, client, other_job_id)
            refuse_something(stack.api_url, api_key)
            ports = stack.management_ports
            wait_until(lambda: has_trainer_again(read(ports["worker"])), what="another trainer")
            pages = {name: read(port) for name, port in ports.items()}
            probes = {name: read(port, "livez") for name, port in ports.items()}
            secrets = (api_key, *vars(stack._servers.secrets).values())
        yield Run(
            lines={name: (directory / "data/logs" / f"{name}.log").read_text().splitlines() for name in ports},
            families={name: families_of(page) for name, page in pages.items()},
            pages=pages,
            probes=probes,
            spans=collector.spans,
            job_id=job_id,
            other_job_id=other_job_id,
            secrets=secrets,
        )


def submit(client: OpenAI, *, n_epochs: int) -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{SECRET_WORD} {n}?"},
                {"role": "assistant", "content": f"Yes, {n}."},
            ]
        }
        for n in range(12)
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=(f"{SECRET_WORD}.jsonl", content), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=file.id,
        validation_file=file.id,
        hyperparameters={"n_epochs": n_epochs, "batch_size": 4},
        metadata={"note": SECRET_WORD},
        extra_body={"learning_rate": 0.001},
    ).id


def lose_trainer(stack: LocalStack, client: OpenAI, job_id: str) -> None:
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "running", what="a running job")
    children = psutil.Process(stack.process("worker").pid).children(recursive=True)
    (trainer,) = (child for child in children if "worker.trainer" in child.cmdline())
    os.kill(trainer.pid, signal.SIGSEGV)
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status != "running", what="the trainer's loss")
    client.fine_tuning.jobs.cancel(job_id)


def has_trainer_again(page: str) -> bool:
    """Return whether the loss is counted and another trainer has shown its device."""
    return (
        'espalier_trainers_lost_total{code="trainer_crashed"} 1.0' in page and "espalier_device_memory_bytes{" in page
    )


def refuse_something(api_url: str, api_key: str) -> None:
    headers = {"authorization": f"Bearer {api_key}"}
    with httpx.Client(base_url=api_url, headers=headers, trust_env=False, timeout=PATIENCE_SECONDS) as client:
        assert client.get("/no/such/page").status_code == 404
        unstorable = {"model": BASE_MODEL, "training_file": "file-" + "0" * 32, "suffix": "a\u0000b"}
        assert client.post("/v1/fine_tuning/jobs", json=unstorable).status_code == 400
        assert client.get("/v1/fine_tuning/jobs", params={"metadata[note]": SECRET_WORD}).status_code == 200


def read(port: int, page: str = "metrics") -> str:
    return httpx.get(f"http://127.0.0.1:{port}/{page}", trust_env=False, timeout=PATIENCE_SECONDS).text


def families_of(page: str) -> set[str]:
    names = {
        family.name + ("_total" if family.type == "counter" else "") for family in text_string_to_metric_families(page)
    }
    return {name for name in names if name.startswith("espalier_") and not name.endswith("_created")}


def test_every_line_of_every_process_is_json(run: Run) -> None:
    for name, lines in run.lines.items():
        assert lines, name
        for line in lines:
            logged = json.loads(line)
            assert {"event", "level", "process", "timestamp"} <= set(logged), (name, line)
    assert {logged["process"] for logged in run.logged} == {"api", "schedule", "worker", "trainer"}


def test_a_line_about_a_job_names_the_job_the_attempt_and_the_tenant(run: Run) -> None:
    for event in ("job.claimed", "job.admitted", "job.left"):
        of_job = [each for each in run.logged if each["event"] == event and each["job_id"] == run.job_id]
        assert [set(each) & {"job_id", "lease_token", "tenant_id"} for each in of_job] == [
            {"job_id", "lease_token", "tenant_id"}
        ], event


def test_nothing_that_is_said_quotes_a_tenants_data_or_a_secret(run: Run) -> None:
    said = "\n".join([*(line for lines in run.lines.values() for line in lines), *run.pages.values(), str(run.spans)])
    assert "job.claimed" in said
    for secret in (SECRET_WORD, "X-Amz-Signature", *run.secrets):
        assert secret not in said


def test_every_figure_is_in_the_documentation_and_the_other_way_round(run: Run) -> None:
    documented = set(re.findall(r"^\| `(espalier_\w+)`", DOCS.read_text(), flags=re.MULTILINE))
    seen = set.union(*run.families.values())
    assert seen - documented == set()
    assert documented - seen <= UNSEEN


def test_no_figure_is_labelled_with_what_a_client_chooses(run: Run) -> None:
    for name, page in run.pages.items():
        assert run.job_id not in page, name
        labels = {
            label for family in text_string_to_metric_families(page) for s in family.samples for label in s.labels
        }
        assert not labels & {"tenant", "tenant_id", "job_id", "path"}, name


@pytest.mark.parametrize(
    ("process", "threads"),
    [
        (
            "schedule",
            (
                "printed output",
                "management",
                "the clock that wakes and expires",
                "cleaning",
                "sweeping",
                "forgetting",
            ),
        ),
        (
            "worker",
            (
                "printed output",
                "management",
                "heartbeats",
                "self-fence",
                "proofs",
                "presence",
                "warmer",
                "watchdog",
            ),
        ),
    ],
)
def test_a_probe_looks_at_every_thread_that_its_process_depends_on(
    run: Run, process: str, threads: tuple[str, ...]
) -> None:
    assert run.probes[process].startswith("ok: ")
    assert set(re.findall("thread '(.+?)'", run.probes[process])) == set(threads)


def test_a_submission_and_its_attempt_are_one_story(run: Run) -> None:
    (attempt,) = (s for s in run.spans if s.name == "attempt" and s.attributes["espalier.job_id"] == run.job_id)
    assert attempt.service == "espalier-worker"
    assert attempt.parent_id == ""
    assert attempt.attributes["espalier.outcome"] == "succeeded"
    (link,) = attempt.links
    (submission,) = (s for s in run.spans if (s.trace_id, s.span_id) == link)
    assert submission.service == "espalier-api"
    (request,) = (s for s in run.spans if s.trace_id == submission.trace_id and s.parent_id == "")
    assert (request.attributes["http.route"], request.attributes["http.request.method"]) == (
        "/v1/fine_tuning/jobs",
        "POST",
    )
    assert submission.trace_id != attempt.trace_id
    assert submission.began_at < attempt.began_at

    phases = [s for s in run.spans if s.parent_id == attempt.span_id]
    assert {s.trace_id for s in phases} == {attempt.trace_id}
    assert {s.name for s in phases} == set(PHASES)
    for phase in phases:
        assert attempt.began_at <= phase.began_at <= phase.ended_at <= attempt.ended_at, phase.name
    once = [s for s in phases if s.name in ("claim", "load", "train")]
    assert [s.name for s in sorted(once, key=lambda s: s.began_at)] == ["claim", "load", "train"]
    assert "adapter" in {s.attributes["espalier.artifact"] for s in phases if s.name == "upload"}


def test_an_attempt_whose_trainer_is_lost_ends_its_trace(run: Run) -> None:
    (attempt,) = (s for s in run.spans if s.name == "attempt" and s.attributes["espalier.job_id"] == run.other_job_id)
    assert attempt.attributes["espalier.outcome"] == "trainer_lost"
