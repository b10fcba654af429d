"""A tenant's lists and look-ups where others have written many rows: none reads more because of that."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from sqlalchemy import Engine, text

from core.db.session import (
    SessionKind,
    TenantSession,
    connect,
    operator_transaction,
    service_transaction,
    tenant_transaction,
)
from core.domain.scheduling import FairnessTerms
from core.services import adapters, api_keys, audit, checkpoints, events, files, jobs, logs, observations, streams
from core.services.explanations import explain_job
from core.services.logs import LogFilter
from core.services.observations import StepRange
from core.services.streams import Watch
from tests.databases import Database, statements_of
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant, add_tenant
from tests.sessions import any_role_transaction

# Most is the tenant's own, which PostgreSQL then takes for as many among the newest, where there are none.
NUM_OWN, NUM_OTHERS = 40_000, 24_000
# Of 8 KiB each, for 100 rows at most, which lie side by side.
MAX_BUFFERS = 50
# What looks at more rows of the tenant's own: the job of each adapter, the lines of all attempts, the blocks of a chart.
MORE_BUFFERS = {
    "an explanation": 200,
    "log lines of an attempt that wrote none": 1500,
    "permissions": 400,
    "adapters": 600,
    "adapters, deep": 600,
    "models": 600,
    "a chart of all steps": 400,
    "a chart of some steps": 400,
}
# An event, a log line, a job, a file, an adapter and a checkpoint for each n; the events and lines are the long job's.
PLANT = """
insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status)
    select uuidv7(), :tenant, 'a', 'fine-tune', 1, repeat('0', 64), 'k', 1, 'processed' from generate_series(1, :num);
insert into jobs (id, name_digits, tenant_id, base_model_id, pool, training_file_id, spec, total_steps, status,
    finished_at, error)
    select uuidv7(), lpad(to_hex(n), 8, '0'), :tenant, s.base_model_id, s.pool, s.training_file_id, s.spec, 1, 'failed',
        now(), '{{"code": "diverged"}}' from generate_series(1, :num) n, jobs s where s.id = :job;
insert into adapters (id, tenant_id, job_id, name, base_model_id, object_prefix, files, size_bytes)
    select uuidv7(), :tenant, id, 'ft:' || id, base_model_id, 'p', '[]', 1 from jobs where tenant_id = :tenant and id <> :job;
insert into checkpoints (id, tenant_id, job_id, lease_token, step, model_name, object_prefix, files, metrics)
    select uuidv7(), :tenant, :job, 1, n, 'ft:' || :job || ':' || n, 'p', '[]', '{{}}' from generate_series(1, :num / 20) n;
insert into checkpoint_permissions (id, tenant_id, checkpoint_id, project_id)
    select uuidv7(), :tenant, c.id, 'p' || n from checkpoints c, generate_series(1, :num / 20) n
    where c.job_id = :job and c.step = 1;
insert into events (id, tenant_id, job_id, level, type, message)
    select uuidv7(), :tenant, :job, 'info', 'message', 'Step ' || n from generate_series(1, :num) n;
insert into log_lines (id, tenant_id, job_id, attempt_number, level, name, details)
    select uuidv7(), :tenant, :job, 1, 'info', 'step.ended', '{{}}' from generate_series(1, :num) n;
insert into audit_entries (tenant_id, actor, action, subject, before, after)
    select :tenant, 'ada', 'tenants.update', 'x', '{{}}', '{{}}' from generate_series(1, :num) n;
"""
STEPS = """
insert into metrics (job_id, step, tenant_id, lease_token, train_loss, train_accuracy, learning_rate, grad_norm, num_tokens,
    valid_loss)
    select :job, n, :tenant, 1, random(), 0.5, 0.1, 1, 1, case when n % 100 = 0 then 1.5 end from generate_series(1, :num) n
"""


@dataclass(frozen=True)
class Crowd:
    """A tenant with a long job, which has written much, and has been quiet since; `middle` are rows by table."""

    tenant: Tenant
    job_id: uuid.UUID
    model: str
    middle: dict[str, uuid.UUID]


@pytest.fixture(scope="module")
def crowd(owner: Engine) -> Iterator[Crowd]:
    quiet = add_tenant(owner)
    job_id = queue_job(owner, quiet).id
    plant(owner, quiet, job_id, NUM_OWN)
    for busy in (add_tenant(owner) for _ in range(4)):
        plant(owner, busy, queue_job(owner, busy).id, NUM_OTHERS // 4)
    with owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze"))
        middle = {
            name: connection.scalars(
                text(f"select id from {name} where tenant_id = :tenant order by id offset 300 limit 1"),
                {"tenant": quiet.id},
            ).one()
            for name in ("jobs", "files", "adapters", "checkpoints", "events", "log_lines", "checkpoint_permissions")
        }
    yield Crowd(quiet, job_id, f"ft:{job_id}:1", middle)


def plant(owner: Engine, tenant: Tenant, job_id: uuid.UUID, num: int) -> None:
    with service_transaction(owner) as session:
        session.execute(text(STEPS), {"tenant": tenant.id, "job": job_id, "num": num})
        session.execute(text("set local session_replication_role = replica"))  # no trigger counts them one by one
        for statement in PLANT.format().split(";\n"):
            if statement.strip():
                session.execute(text(statement), {"tenant": tenant.id, "job": job_id, "num": num})


def buffers_of(session: SessionKind, ask: Callable[[SessionKind], object]) -> int:
    """Return how many of its buffers PostgreSQL looks at for the statements of a service."""
    with statements_of(session.get_bind().engine) as seen:
        ask(session)
    asked = session.connection()
    plans = [
        asked.exec_driver_sql(f"explain (analyze, buffers, format json) {statement}", parameters).scalar_one()[0][
            "Plan"
        ]
        for statement, parameters in seen
        if not statement.startswith("set local ")  # there is no plan of it
    ]
    assert plans
    return sum(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans)


def ask_log_lines(
    session: TenantSession, crowd: Crowd, *, attempt: int | None = None, after: uuid.UUID | None = None
) -> object:
    wanted = LogFilter(attempt_number=attempt, after=after, limit=100)
    return logs.list_log_lines(session, crowd.tenant.id, job_id=crowd.job_id, wanted=wanted)


def ask_events(session: TenantSession, crowd: Crowd, *, after: uuid.UUID | None) -> object:
    return events.list_events(session, crowd.tenant.id, job_id=crowd.job_id, after=after, limit=100)


def ask_stream(session: TenantSession, crowd: Crowd, *, after: int) -> object:
    watch = Watch(crowd.job_id, crowd.tenant.key_id, after=after)
    return streams.read_watches(session, crowd.tenant.id, watches=[watch])


def ask_checkpoints(session: TenantSession, crowd: Crowd, *, after: uuid.UUID | None) -> object:
    return adapters.list_checkpoints(session, crowd.tenant.id, job_id=crowd.job_id, after=after, limit=100)


def ask_files(session: TenantSession, crowd: Crowd, **options: object) -> object:
    wanted: dict[str, object] = {"purpose": None, "after": None, "limit": 100, "order": "desc"}
    return files.list_files(session, crowd.tenant.id, **{**wanted, **options})  # type: ignore[arg-type]


def ask_permissions(session: TenantSession, crowd: Crowd, *, after: uuid.UUID | None) -> object:
    return checkpoints.list_permissions(
        session, crowd.tenant.id, name=crowd.model, after=after, limit=100, order="descending", project_id=None
    )


def ask_explanation(session: TenantSession, crowd: Crowd) -> object:
    now = dt.datetime.now(dt.UTC)
    return explain_job(session, crowd.tenant.id, job_id=crowd.job_id, now=now, terms=FairnessTerms())


Ask = Callable[[TenantSession, Crowd], object]
LISTS: dict[str, Ask] = {
    "jobs": lambda s, c: jobs.list_jobs(s, c.tenant.id, after=None, limit=100),
    "jobs, deep": lambda s, c: jobs.list_jobs(s, c.tenant.id, after=c.middle["jobs"], limit=100),
    "a job": lambda s, c: jobs.get_job(s, c.tenant.id, job_id=c.job_id),
    "an explanation": ask_explanation,
    "events": lambda s, c: ask_events(s, c, after=None),
    "events, deep": lambda s, c: ask_events(s, c, after=c.middle["events"]),
    "a stream from its begin": lambda s, c: ask_stream(s, c, after=0),
    "a stream at its end": lambda s, c: ask_stream(s, c, after=NUM_OWN - 10),
    "log lines": ask_log_lines,
    "log lines, deep": lambda s, c: ask_log_lines(s, c, after=c.middle["log_lines"]),
    "log lines of an attempt that wrote none": lambda s, c: ask_log_lines(s, c, attempt=2),
    "checkpoints": lambda s, c: ask_checkpoints(s, c, after=None),
    "checkpoints, deep": lambda s, c: ask_checkpoints(s, c, after=c.middle["checkpoints"]),
    "a checkpoint": lambda s, c: checkpoints.find_checkpoint(s, c.tenant.id, name=c.model),
    "permissions": lambda s, c: ask_permissions(s, c, after=None),
    "permissions, deep": lambda s, c: ask_permissions(s, c, after=c.middle["checkpoint_permissions"]),
    "files": ask_files,
    "files, deep": lambda s, c: ask_files(s, c, after=c.middle["files"]),
    "files of a purpose": lambda s, c: ask_files(s, c, purpose="fine-tune"),
    "files, oldest first": lambda s, c: ask_files(s, c, order="asc"),
    "adapters": lambda s, c: adapters.list_adapters(s, c.tenant.id, after=None, limit=100),
    "adapters, deep": lambda s, c: adapters.list_adapters(s, c.tenant.id, after=c.middle["adapters"], limit=100),
    "models": lambda s, c: adapters.list_models(s, c.tenant.id, limit=100),
    "API keys": lambda s, c: api_keys.list_api_keys(s, c.tenant.id),
    "a chart of all steps": lambda s, c: chart(s, c, StepRange(1, 2**40)),
    "a chart of some steps": lambda s, c: chart(s, c, StepRange(1001, 9000)),
}


def chart(session: TenantSession, crowd: Crowd, steps: StepRange) -> object:
    return observations.read_observations(session, crowd.tenant.id, job_id=crowd.job_id, steps=steps, points=60)


@pytest.mark.parametrize("name", LISTS)
def test_no_list_of_a_tenant_reads_what_others_wrote(database: Database, crowd: Crowd, name: str) -> None:
    engine = connect(database.api_url)
    with tenant_transaction(engine, crowd.tenant.id) as session:
        num_buffers = buffers_of(session, lambda asking: LISTS[name](asking, crowd))
    engine.dispose()
    assert num_buffers < MORE_BUFFERS.get(name, MAX_BUFFERS)


def test_one_stream_catches_up_in_few_reads_and_many_at_once_fill_no_memory(owner: Engine, crowd: Crowd) -> None:
    watch = Watch(crowd.job_id, crowd.tenant.key_id, after=0)
    with any_role_transaction(owner) as session:
        for num_watches, num_events in ((1, 1000), (10, 100), (100, 50)):
            states = streams.read_watches(session, crowd.tenant.id, watches=[watch] * num_watches)
            assert {(len(state.events), state.has_more) for state in states} == {(num_events, True)}


@pytest.mark.parametrize("before", [None, 300])
def test_a_tenants_audit_entries_are_found_behind_those_of_others(
    owner: Engine, crowd: Crowd, before: int | None
) -> None:
    with operator_transaction(owner, actor="test") as session:
        num_buffers = buffers_of(
            session, lambda asking: audit.list_audit_entries(asking, crowd.tenant.id, before=before, limit=100)
        )
    assert num_buffers < MAX_BUFFERS
