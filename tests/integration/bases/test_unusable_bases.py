"""A base that cannot be used costs no tenant anything: a real runner and real trainers, on bases that are broken."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import Engine, func, select, update
from structlog.testing import capture_logs

from core.db.clock import DatabaseClock
from core.db.models import Attempt, BaseModelRow, BaseTokenizer, Event, Job, Pool
from core.db.session import connect, service_transaction
from core.domain.bases import BaseState
from core.domain.errors import ConflictError
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.job_requests import JobRequest
from core.domain.workers import WorkerFacts
from core.services import claims
from core.services.base_models import record_state
from core.services.files import create_file
from core.services.submissions import submit_job
from core.services.workers import record_worker
from core.settings import WorkerSettings
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.e2e.lab import write_tiny_base
from tests.integration.conftest import Database, Tenant
from tests.integration.training import BASE_MODEL, POOL, queue_job
from tests.waiting import wait_until
from worker.supervisor.orders import order_job
from worker.supervisor.runner import Runner

NF4_POOL = f"{BASE_MODEL}@nf4"


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def settings(database: Database, servers: ServerAddresses, tmp_path: Path) -> WorkerSettings:
    storage = servers.storage
    return WorkerSettings.model_validate(
        {
            "database_url": database.worker_url,
            "redis_url": servers.redis_url,
            "s3_endpoint": storage.endpoint,
            "s3_access_key": storage.access_key,
            "s3_secret_key": storage.secret_key,
            "worker_name": "tried",
            "worker_pools": (POOL, NF4_POOL),
            "cache_dir": tmp_path / "cache",
            "trainer_threads": 1,
        }
    )


@pytest.fixture
def start(servers: ServerAddresses, owner: Engine) -> Iterator[Callable[[WorkerSettings], Runner]]:
    """Make runners, and see to it that no job or trainer is left to the next test."""
    made: list[Runner] = []

    def make(settings: WorkerSettings) -> Runner:
        url = settings.database_url.get_secret_value()
        engine, store = connect(url), S3ObjectStore(servers.storage)
        clock = DatabaseClock(engine)
        made.append(Runner(settings, engine=engine, heartbeat_engine=connect(url), store=store, clock=clock))
        return made[-1]

    yield make
    for runner in made:
        runner.request_stop()
        runner.close()
    with service_transaction(owner) as session:
        session.connection().exec_driver_sql("delete from workers")
        session.connection().exec_driver_sql(
            "update jobs set status = 'cancelled', finished_at = now(), lease_token = null, lease_until = null "
            "where status in ('queued', 'running')"
        )


def place(owner: Engine, directory: Path, **changes: Any) -> None:
    """Register the base anew, as one that nobody has looked at or loaded."""
    source = {"kind": "path", "location": str(directory), "revision": ""}
    fresh = {"state": "unchecked", "state_reason": None, "state_since": func.clock_timestamp(), "checked_by": None}
    with service_transaction(owner) as session:
        session.execute(update(BaseModelRow).values(source=source, **fresh, **changes))
        session.execute(update(Pool).values(load_seconds=None))


def row_of(owner: Engine) -> BaseModelRow:
    with service_transaction(owner) as session:
        return session.scalars(select(BaseModelRow).where(BaseModelRow.id == BASE_MODEL)).one()


def tries_of(owner: Engine, job: Job) -> tuple[str, int, int]:
    with service_transaction(owner) as session:
        row = session.get_one(Job, job.id)
        made = session.scalars(select(Attempt).where(Attempt.job_id == job.id)).all()
        return row.status, row.attempt_count, len(made)


def told(owner: Engine, job: Job) -> list[str]:
    with service_transaction(owner) as session:
        return list(session.scalars(select(Event.message).where(Event.job_id == job.id).order_by(Event.number)))


def trainers() -> set[int]:
    return {child.pid for child in psutil.Process().children() if "worker.trainer" in child.cmdline()}


def show_presence(owner: Engine, facts: WorkerFacts) -> None:
    with service_transaction(owner) as session:
        record_worker(session, facts, alive_seconds=60, is_start=True)


def claimable(owner: Engine) -> set[str]:
    with service_transaction(owner) as session:
        return set(claims.claimable_pools(session))


def test_a_base_that_is_not_there_costs_its_job_no_attempt_and_its_row_says_why(
    start: Callable[[WorkerSettings], Runner], settings: WorkerSettings, owner: Engine, tenant: Tenant, tmp_path: Path
) -> None:
    place(owner, tmp_path / "nowhere")
    job = queue_job(owner, tenant.id)
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
        queue_job(owner, tenant.id)
    assert (refused.value.code, refused.value.param) == ("base_model_unusable", "model")
    assert "nowhere" not in refused.value.message
    assert trainers() == set()


def test_what_a_worker_lacks_is_its_own_trouble_and_the_base_stays_open_to_others(
    start: Callable[[WorkerSettings], Runner], settings: WorkerSettings, owner: Engine, tenant: Tenant, tiny_base: Path
) -> None:
    place(owner, tiny_base)
    job = queue_job(owner, tenant.id)
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
    queue_job(owner, tenant.id)
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
    queue_job(owner, tenant.id)
    with service_transaction(owner) as session:
        session.execute(update(BaseModelRow).values(disabled_at=func.now()))
    try:
        start(settings).serve()
        assert row_of(owner).state == BaseState.UNUSABLE  # it was tried
    finally:
        with service_transaction(owner) as session:
            session.execute(update(BaseModelRow).values(disabled_at=None))


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


def queue_real_job(owner: Engine, tenant: Tenant, store: S3ObjectStore, *, base_model_id: str = BASE_MODEL) -> Job:
    """Queue a job of one step on rows that are really stored."""
    rows = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"}] for n in range(4)]
    content = "\n".join(json.dumps({"messages": row}) for row in rows).encode()
    file_id = new_id()
    stored = store.put_bytes(f"tenants/{tenant.id}/files/{file_id}", content, content_type="application/jsonl")
    new = NewFile(
        id=file_id,
        filename="rows.jsonl",
        purpose="fine-tune",
        object_key=f"tenants/{tenant.id}/files/{file_id}",
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        num_examples=len(rows),
    )
    request = JobRequest(base_model_id=base_model_id, training_file_id=file_id, n_epochs=1, batch_size=4, rank=4)
    with service_transaction(owner) as session:
        create_file(session, tenant.id, new=new)
        return submit_job(session, tenant.id, request=request)


def copy_base(owner: Engine, base_model_id: str, directory: Path) -> str:
    with service_transaction(owner) as session:
        session.connection().exec_driver_sql(
            "insert into base_models (id, source, dtype, quantizations, target_modules, max_seq_len, max_rank, slots, "
            "max_tokens_per_step) select %s, jsonb_set(source, '{location}', to_jsonb(%s::text)), dtype, '{}', "
            "target_modules, max_seq_len, max_rank, slots, max_tokens_per_step from base_models limit 1",
            (base_model_id, str(directory)),
        )
    return base_model_id


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
