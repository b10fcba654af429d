"""A supervisor with a real trainer: a cancelled job leaves the device in whatever state it is, and that is recorded."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from core.db.clock import DatabaseClock
from core.db.session import connect, service_transaction
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.job_requests import JobRequest
from core.domain.objects import file_key
from core.domain.scheduling import FairnessTerms
from core.services.files import create_file
from core.services.jobs import cancel_job
from core.services.promises import check_rows
from core.services.submissions import submit_job
from core.settings import WorkerSettings
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.e2e.lab import write_tiny_base
from tests.integration.conftest import BASE_MODEL, Database, Tenant
from tests.integration.test_attempts import POOL
from tests.waiting import wait_until
from worker.supervisor.runner import Runner

ROWS = "\n".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
    )
    for n in range(400)
).encode()


@pytest.fixture
def runner(database: Database, owner: Engine, servers: ServerAddresses, tmp_path: Path) -> Iterator[Runner]:
    base = write_tiny_base(tmp_path / "base")
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs, workers cascade"))
        source = json.dumps({"kind": "path", "location": str(base), "revision": ""})
        session.execute(text("update base_models set source = cast(:source as jsonb)"), {"source": source})
    storage = servers.storage
    settings = WorkerSettings(
        database_url=database.worker_url,
        redis_url=servers.redis_url,
        s3_endpoint=storage.endpoint,
        s3_access_key=storage.access_key,
        s3_secret_key=storage.secret_key,
        s3_bucket=storage.bucket,
        worker_name="w",
        worker_pools=(POOL,),
        cache_dir=tmp_path / "cache",
        scratch_dir=tmp_path,
        heartbeat_seconds=0.2,
        trainer_threads=1,
    )
    engines = [connect(database.worker_url, pool_size=2), connect(database.worker_url, pool_size=1)]
    store, clock = S3ObjectStore(storage), DatabaseClock(engines[0])
    made = Runner(settings, engine=engines[0], heartbeat_engine=engines[1], store=store, clock=clock)
    yield made
    made.close()
    for engine in engines:
        engine.dispose()


def submit(owner: Engine, servers: ServerAddresses, tenant: Tenant) -> object:
    file_id = new_id()
    key = file_key(tenant.id, file_id)
    S3ObjectStore(servers.storage).put_bytes(key, ROWS, content_type="application/jsonl")
    with service_transaction(owner) as session:
        new = NewFile(file_id, "a", "fine-tune", key, len(ROWS), hashlib.sha256(ROWS).hexdigest(), num_examples=400)
        create_file(session, tenant.id, new=new)
        request = JobRequest(base_model_id=BASE_MODEL, training_file_id=file_id)
        return submit_job(session, tenant.id, request=request).id


def test_a_cancelled_jobs_leaving_is_recorded_before_its_supervisor_rests(
    runner: Runner, owner: Engine, servers: ServerAddresses, tenant: Tenant
) -> None:
    job_id = submit(owner, servers, tenant)

    def ask(question: str) -> object:
        with service_transaction(owner) as session:
            return session.scalars(text(question), {"id": job_id}).one_or_none()

    serving = threading.Thread(target=runner.serve)
    serving.start()
    wait_until(lambda: bool(ask("select 1 from metrics where job_id = :id limit 1")))
    with service_transaction(owner) as session:
        cancel_job(session, tenant.id, job_id=job_id)  # type: ignore[arg-type]
    serving.join(60)
    assert not serving.is_alive()
    assert ask("select 1 from attempts where job_id = :id and left_device_at >= ended_at") == 1
    assert ask("select 1 from usage where tenant_id = (select tenant_id from jobs where id = :id)") == 1
    with service_transaction(owner) as session:
        assert [finding for finding in check_rows(session, FairnessTerms()) if finding.num_broken] == []
