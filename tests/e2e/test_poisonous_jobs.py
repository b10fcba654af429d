"""A job that cannot be read, recorded or ended harms neither its worker nor its neighbours."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import httpx
import pytest
from sqlalchemy import Engine

from core.db.session import connect
from tests.e2e.lab import LONG, Lab
from tests.integration.poisoning import break_row, change
from tests.waiting import PATIENCE_SECONDS


@pytest.fixture
def owner(lab: Lab) -> Iterator[Engine]:
    engine = connect(lab.servers.direct.postgres_url)
    yield engine
    engine.dispose()


def id_of(job_id: str) -> uuid.UUID:
    return uuid.UUID(job_id.removeprefix("ftjob-"))


def test_a_job_that_no_worker_can_read_waits_and_says_so_while_others_train(lab: Lab, owner: Engine) -> None:
    lab.ensure_worker()
    with lab.rows.claims_held():
        poisonous = lab.submit(n_epochs=1, priority=1)
        change(owner, "jobs", id_of(poisonous), spec="""spec || '{"n_epochs": 0}'""")
        sound = lab.submit(n_epochs=1)
    lab.succeed(sound)
    url = f"{lab.stack.api_url}/v1/fine_tuning/jobs/{poisonous}/explain"
    told = httpx.get(
        url, headers={"authorization": f"Bearer {lab.api_key}"}, trust_env=False, timeout=PATIENCE_SECONDS
    ).json()
    assert (told["status"], told["reason"]["code"]) == ("queued", "unclaimable")
    change(owner, "jobs", id_of(poisonous), spec="""spec || '{"n_epochs": 1}'""")
    assert lab.rows.attempt_count(poisonous) == 0


@pytest.mark.parametrize("errcode", ["22003", "XX001"], ids=["out of range", "damaged"])
def test_a_report_that_cannot_be_stored_ends_its_own_attempt_only(lab: Lab, owner: Engine, errcode: str) -> None:
    lab.ensure_worker()
    with lab.rows.claims_held():
        poisonous, sound = (lab.submit(**LONG, seed=seed) for seed in (1, 2))
        lab.rows.limit_attempts(poisonous, 1)
        break_row(owner, "metrics", "job_id", id_of(poisonous), verb="insert", errcode=errcode)
    assert lab.wait_for_end(poisonous).error.code == "unrecordable"
    lab.succeed(sound)
    assert lab.rows.attempt_count(sound) == 1, lab.rows.messages(sound)


def test_a_result_that_cannot_be_published_ends_its_own_attempt_only(lab: Lab, owner: Engine) -> None:
    lab.ensure_worker()
    with lab.rows.claims_held():
        poisonous, sound = lab.submit(n_epochs=1), lab.submit(**LONG)
        lab.rows.limit_attempts(poisonous, 1)
        break_row(owner, "adapters", "job_id", id_of(poisonous), verb="insert")
    assert lab.wait_for_end(poisonous).error.code == "unrecordable"
    lab.succeed(sound)
    assert lab.rows.attempt_count(sound) == 1, lab.rows.messages(sound)
