"""An unusable base costs no tenant anything, and is used again after its repair."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine
from structlog.testing import capture_logs

from core.db.session import service_transaction
from core.domain.bases import BaseState
from core.domain.errors import ConflictError
from core.domain.workers import WorkerFacts
from core.services.base_models import record_state
from core.settings import WorkerSettings
from tests.factories.bases import BASE_MODEL, NF4_POOL, POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.integration.bases.placing import claimable, place, row_of, show_presence, told, trainers, tries_of
from worker.supervisor.runner import Runner


def test_a_base_that_is_not_there_costs_its_job_no_attempt_and_its_row_says_why(
    start: Callable[[WorkerSettings], Runner], settings: WorkerSettings, owner: Engine, tenant: Tenant, tmp_path: Path
) -> None:
    place(owner, tmp_path / "nowhere")
    job = queue_job(owner, tenant)
    runner = start(settings)
    runner.serve()
    assert tries_of(owner, job) == ("queued", 0, 0)
    assert [message for message in told(owner, job) if "base model" in message] == [
        f"A worker is loading the base model {BASE_MODEL}.",
        f"The worker could not load the base model {BASE_MODEL}; the job waits for another, and loses no attempt.",
    ]
    row = row_of(owner)
    assert row.state == BaseState.UNUSABLE
    assert str(row.checked_by).startswith("tried:")
    assert row.state_reason == f"There is no base model at {tmp_path}/nowhere."
    assert set(runner.describe().refusals) == {POOL, NF4_POOL}
    assert claimable(owner) == set()
    with pytest.raises(ConflictError, match="cannot be trained on at the moment") as refused:
        queue_job(owner, tenant)
    assert (refused.value.code, refused.value.param) == ("base_model_unusable", "model")
    assert "nowhere" not in refused.value.message
    assert trainers() == set()


def test_what_a_worker_lacks_is_its_own_trouble_and_the_base_stays_open_to_others(
    start: Callable[[WorkerSettings], Runner], settings: WorkerSettings, owner: Engine, tenant: Tenant, tiny_base: Path
) -> None:
    place(owner, tiny_base)
    job = queue_job(owner, tenant)
    runner = start(settings.model_copy(update={"scratch_dir": Path("/nowhere")}))
    runner.serve()
    assert tries_of(owner, job) == ("queued", 0, 0)
    assert row_of(owner).state == BaseState.UNCHECKED
    assert "/nowhere" in runner.describe().refusals[POOL]
    assert claimable(owner) == {POOL}  # nobody is known to be alive
    show_presence(owner, runner.describe())
    assert claimable(owner) == set()
    show_presence(owner, WorkerFacts("other", (POOL,), "idle"))
    assert claimable(owner) == {POOL}


def test_a_base_that_is_put_right_is_used_again_without_anybodys_doing(
    start: Callable[[WorkerSettings], Runner],
    settings: WorkerSettings,
    owner: Engine,
    tenant: Tenant,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.supervisor.refusals._FIRST_RETRY_SECONDS", 0.0)
    place(owner, tmp_path / "late")
    queue_job(owner, tenant)
    runner = start(settings)
    with capture_logs() as lines:
        runner.serve()
        runner.warm()
    assert row_of(owner).state == BaseState.UNUSABLE
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["base_model.refused"]
    shutil.copytree(tiny_base, tmp_path / "late")
    runner.warm()
    assert row_of(owner).state == BaseState.USABLE
    assert claimable(owner) == {POOL}
    assert runner.describe().refusals == {}


def test_a_refused_base_is_tried_seldom_and_at_once_when_its_row_has_changed(
    start: Callable[[WorkerSettings], Runner], settings: WorkerSettings, owner: Engine, tiny_base: Path, tmp_path: Path
) -> None:
    place(owner, tmp_path / "nowhere")
    runner = start(settings)
    runner.warm()
    assert row_of(owner).state == BaseState.UNUSABLE
    shutil.copytree(tiny_base, tmp_path / "nowhere")
    for _ in range(3):
        runner.warm()  # the next try is not due
    assert row_of(owner).state == BaseState.UNUSABLE
    place(owner, tiny_base)  # the operator has changed it
    runner.warm()
    assert row_of(owner).state == BaseState.USABLE


def test_one_worker_alone_does_not_call_a_base_unusable_that_another_alive_holds_or_found_well(owner: Engine) -> None:
    def find(state: BaseState, *, by: str) -> str:
        reason = "It is not mounted." if state == BaseState.UNUSABLE else None
        with service_transaction(owner) as session:
            record_state(session, BASE_MODEL, state=state, reason=reason, by=by)
        return row_of(owner).state

    place(owner, Path("/anywhere"))
    show_presence(owner, WorkerFacts("well", (POOL,), "idle", "another@none", 1))
    assert find(BaseState.USABLE, by="well") == "usable"
    assert find(BaseState.UNUSABLE, by="blind") == "usable"
    assert find(BaseState.UNUSABLE, by="well") == "unusable"
    show_presence(owner, WorkerFacts("holder", (POOL,), "serving", POOL, 1))
    assert find(BaseState.USABLE, by="gone") == "usable"
    assert find(BaseState.UNUSABLE, by="blind") == "usable"
    with service_transaction(owner) as session:
        session.connection().exec_driver_sql("delete from workers")
    assert find(BaseState.UNUSABLE, by="blind") == "unusable"
