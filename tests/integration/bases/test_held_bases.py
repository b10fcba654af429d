"""An idle worker loads its base before a job arrives, keeps it while it looks at others, and reports loads."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, update

from core.db.models import BaseModelRow, BaseTokenizer, Job
from core.db.session import connect, service_transaction
from core.domain.bases import BaseState
from core.services import claims
from core.settings import WorkerSettings
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.bases import BASE_MODEL, POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.integration.bases.placing import copy_base, place, queue_real_job, row_of, told, trainers, tries_of
from tests.waiting import wait_until
from worker.supervisor.orders import order_job
from worker.supervisor.runner import Runner


def test_an_idle_worker_has_its_first_base_and_the_tokenizer_before_a_job_which_then_waits_for_no_load(
    start: Callable[[WorkerSettings], Runner],
    settings: WorkerSettings,
    owner: Engine,
    tenant: Tenant,
    servers: ServerAddresses,
    tiny_base: Path,
) -> None:
    place(owner, tiny_base)
    runner = start(settings)
    runner.warm()
    facts = runner.describe()
    assert (facts.state, facts.pool, facts.slots, facts.slots_in_use) == ("idle", POOL, 8, 0)
    assert row_of(owner).state == BaseState.USABLE
    with service_transaction(owner) as session:
        assert session.get(BaseTokenizer, BASE_MODEL) is not None
    warm = trainers()
    assert len(warm) == 1
    runner.warm()
    job = queue_real_job(owner, tenant, S3ObjectStore(servers.storage))
    runner.serve()
    assert tries_of(owner, job) == ("succeeded", 1, 1)
    assert trainers() == warm


def test_a_worker_that_is_stopped_while_it_warms_ends_its_trainer_and_says_nothing_of_the_base(
    start: Callable[[WorkerSettings], Runner], settings: WorkerSettings, owner: Engine, tiny_base: Path
) -> None:
    place(owner, tiny_base)
    runner = start(settings)
    warming = threading.Thread(target=runner.warm)
    warming.start()
    wait_until(lambda: runner.describe().state == "loading")
    assert runner.describe().pool == POOL
    runner.request_stop()
    warming.join(60)
    assert not warming.is_alive()
    assert trainers() == set()
    assert row_of(owner).state == BaseState.UNCHECKED


def test_other_bases_are_looked_at_while_one_is_held_and_what_is_held_stays(
    start: Callable[[WorkerSettings], Runner],
    settings: WorkerSettings,
    owner: Engine,
    tenant: Tenant,
    servers: ServerAddresses,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.supervisor.refusals._FIRST_RETRY_SECONDS", 0.0)
    place(owner, tiny_base)
    broken = Path(shutil.copytree(tiny_base, tmp_path / "broken"))
    config = broken / "config.json"
    sound = config.read_text()
    config.write_text(json.dumps(json.loads(sound) | {"model_type": "gpt2"}))
    other = copy_base(owner, "acme-labs/other", broken)
    runner = start(settings.model_copy(update={"worker_pools": (POOL, f"{other}@none")}))
    runner.warm()
    warm = trainers()
    assert len(warm) == 1
    with service_transaction(owner) as session:
        row = session.get_one(BaseModelRow, other)
        assert (row.state, row.state_reason) == (BaseState.UNUSABLE, row.state_reason)
        assert "Models of type 'gpt2' cannot be fused" in str(row.state_reason)
    config.write_text(sound)
    runner.warm()
    with service_transaction(owner) as session:
        assert session.get_one(BaseModelRow, other).state == BaseState.UNCHECKED
    config.unlink()
    job = queue_real_job(owner, tenant, S3ObjectStore(servers.storage), base_model_id=other)
    runner.serve()
    assert tries_of(owner, job) == ("queued", 0, 0)
    with service_transaction(owner) as session:
        assert session.get_one(BaseModelRow, other).state == BaseState.UNUSABLE
    assert trainers() == warm


def test_a_job_that_waits_for_a_load_is_told_of_it_and_of_its_seconds(
    start: Callable[[WorkerSettings], Runner],
    settings: WorkerSettings,
    servers: ServerAddresses,
    owner: Engine,
    tenant: Tenant,
    tiny_base: Path,
) -> None:
    place(owner, tiny_base)
    store = S3ObjectStore(servers.storage)
    with service_transaction(owner) as session:
        session.connection().exec_driver_sql("delete from pools")
    first = queue_real_job(owner, tenant, store)
    runner = start(settings)
    runner.serve()
    second = queue_real_job(owner, tenant, store)
    runner.serve()
    assert [tries_of(owner, job)[0] for job in (first, second)] == ["succeeded", "succeeded"]
    begun, ended, then = told(owner, first)[1:4]
    assert begun == f"A worker is loading the base model {BASE_MODEL}."
    assert re.fullmatch(r"The base model was loaded in \d+\.\d s\.", ended)
    assert then == "Attempt 1 has started."
    assert not [message for message in told(owner, second) if "base model" in message], "it was held"
    with service_transaction(owner) as session:
        job = session.get_one(Job, first.id)
        assert (job.trained_steps, job.skipped_steps) == (job.total_steps, 0)
        assert job.datasets is not None
        assert job.datasets["training"] == {
            "num_examples": 4,
            "num_truncated": 0,
            "num_dropped": 0,
            "num_left_out_turns": 0,
        }


def test_jobs_on_a_base_that_is_served_no_more_are_still_served(
    start: Callable[[WorkerSettings], Runner], settings: WorkerSettings, owner: Engine, tenant: Tenant, tmp_path: Path
) -> None:
    place(owner, tmp_path / "nowhere")
    queue_job(owner, tenant)
    with service_transaction(owner) as session:
        session.execute(update(BaseModelRow).values(disabled_at=func.now()))
    try:
        start(settings).serve()
        assert row_of(owner).state == BaseState.UNUSABLE  # it was tried
    finally:
        with service_transaction(owner) as session:
            session.execute(update(BaseModelRow).values(disabled_at=None))


def test_a_trainer_is_told_the_licence_of_its_jobs_base(
    database: Database, servers: ServerAddresses, owner: Engine, tenant: Tenant, tmp_path: Path
) -> None:
    base, store = copy_base(owner, "acme-labs/licensed", tmp_path), S3ObjectStore(servers.storage)
    with service_transaction(owner) as session:
        session.execute(update(BaseModelRow).where(BaseModelRow.id == base).values(license="mit"))
    queue_real_job(owner, tenant, store, base_model_id=base)
    worker = connect(database.worker_url)
    with service_transaction(worker) as session:
        job = claims.claim_job(session, f"{base}@none", worker_name="w", lease_seconds=3600)
        assert job is not None
        assert order_job(session, job, store=store).facts.base_license == "mit"
    worker.dispose()
