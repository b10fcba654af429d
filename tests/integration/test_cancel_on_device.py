"""A supervisor with a real trainer: a cancelled job leaves the device in whatever state it is, and that is recorded."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from core.db.session import service_transaction
from core.domain.scheduling import FairnessTerms
from core.services.jobs import cancel_job
from core.services.promises import check_rows
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.jobs import queue_trainable_job
from tests.factories.tenants import Tenant
from tests.factories.tiny_bases import write_tiny_base
from tests.sessions import any_role_transaction
from tests.supervisors import running_runner, worker_settings
from tests.waiting import wait_until
from worker.supervisor.runner import Runner


@pytest.fixture
def runner(database: Database, owner: Engine, servers: ServerAddresses, tmp_path: Path) -> Iterator[Runner]:
    base = write_tiny_base(tmp_path / "base")
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs, workers cascade"))
        source = json.dumps({"kind": "path", "location": str(base), "revision": ""})
        session.execute(text("update base_models set source = cast(:source as jsonb)"), {"source": source})
    settings = worker_settings(database, servers, tmp_path, scratch_dir=tmp_path, heartbeat_seconds=0.2)
    with running_runner(settings) as made:
        yield made


def test_a_cancelled_jobs_leaving_is_recorded_before_its_supervisor_rests(
    runner: Runner, owner: Engine, servers: ServerAddresses, tenant: Tenant
) -> None:
    job_id = queue_trainable_job(owner, servers, tenant)

    def ask(question: str) -> object:
        with service_transaction(owner) as session:
            return session.scalars(text(question), {"id": job_id}).one_or_none()

    serving = threading.Thread(target=runner.serve)
    serving.start()
    wait_until(lambda: bool(ask("select 1 from metrics where job_id = :id limit 1")))
    with service_transaction(owner) as session:
        cancel_job(session, tenant.id, job_id=job_id)
    serving.join(60)
    assert not serving.is_alive()
    assert ask("select 1 from attempts where job_id = :id and left_device_at >= ended_at") == 1
    assert ask("select 1 from usage where tenant_id = (select tenant_id from jobs where id = :id)") == 1
    with any_role_transaction(owner) as session:
        assert [finding for finding in check_rows(session, FairnessTerms()) if finding.num_broken] == []
