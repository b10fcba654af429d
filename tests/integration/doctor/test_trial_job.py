"""The doctor's own job: the operator reads why it waits, and nothing of it is left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine
from typer.testing import CliRunner

from cli import output
from cli.doctor import trial
from cli.main import app
from core.db.migrate import login_url
from core.db.session import service_transaction
from core.domain.workers import WorkerFacts
from core.services.workers import forget_worker, record_worker
from local.ports import free_ports
from local.servers import ServerAddresses
from tests.databases import LOGINS
from tests.factories.bases import BASE_MODEL
from tests.integration.doctor.examining import POOLS, Examine
from tests.processes import running_api


def test_a_job_needs_an_api(examine: Examine) -> None:
    assert examine("--job")["job"]["state"] == "failed"


def test_a_job_that_nobody_takes_is_given_up_and_leaves_nothing_behind(examine: Examine, own: ServerAddresses) -> None:
    (port,) = free_ports(1)
    with running_api(login_url(own.postgres_url, LOGINS[0]), own.storage, port=port):
        found = examine("--job", "--patience", "1", "--api-url", f"http://127.0.0.1:{port}")["job"]
    assert (found["state"], "still queued and was cancelled" in found["says"]) == ("failed", True), found
    with psycopg.connect(own.postgres_url) as connection:
        alive = "select count(*) from api_keys k join tenants t on t.id = k.tenant_id where t.slug = 'espalier-doctor' and revoked_at is null"
        assert connection.execute(alive).fetchone() == (0,)
        unfinished = "select count(*) from jobs where status not in ('cancelled')"
        assert connection.execute(unfinished).fetchone() == (0,)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_who_waits_for_a_job_is_told_which_it_is_and_each_new_reason_once(
    own: ServerAddresses,
    owner: Engine,
    env: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: str | None,
) -> None:
    """On standard error. A pool that a worker holds is taken; where none is held the reason is heard to change."""
    monkeypatch.setattr(trial, "_EXPLAIN_SECONDS", 0.1)
    told: list[str] = []

    def tell(sentence: str) -> None:
        told.append(sentence)
        output.tell(sentence)
        if len(told) == 2 and quantization is None:  # the first reason
            start_worker(state="idle")

    def start_worker(**facts: Any) -> None:
        with service_transaction(owner) as session:
            record_worker(session, WorkerFacts("gpu-1", POOLS, **facts), alive_seconds=600, is_start=True)

    monkeypatch.setattr(trial, "tell", tell)
    if quantization:
        start_worker(state="serving", pool=f"{BASE_MODEL}@{quantization}", slots=8)
    (port,) = free_ports(1)
    argv = ["doctor", "--data-dir", str(tmp_path), "--json", "--job", "--patience", "4"]
    with running_api(login_url(own.postgres_url, LOGINS[0]), own.storage, port=port):
        argv += ["--api-url", f"http://127.0.0.1:{port}"]
        done = CliRunner().invoke(app, argv, env=env, catch_exceptions=False)
    with service_transaction(owner) as session:
        forget_worker(session, "gpu-1")
    lines = done.stderr.splitlines()
    pool = f"{BASE_MODEL}@{quantization or 'none'}"
    assert re.fullmatch(rf"Job ftjob-[0-9a-f]{{32}} was submitted: base {BASE_MODEL}, pool {pool}\.", lines[0])
    assert "orker" in lines[1] or quantization
    assert len(lines) == len(set(lines)) == (2 if quantization else 3), lines
    assert all(json.loads(line)["check"] for line in done.stdout.splitlines())
