"""One invalid row stops only itself: the process that meets it sets it aside with a reason and serves the others."""

from __future__ import annotations

import datetime as dt
import math
import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, func, select, text
from typer.testing import CliRunner

from cli.main import app
from core.db.models import Attempt, Job, Usage
from core.db.session import service_transaction, tenant_transaction
from core.domain.duties import Duty
from core.domain.failures import Failure
from core.domain.leases import Lease
from core.domain.outlook import WaitCode
from core.domain.scheduling import FairnessTerms
from core.domain.training import TrainingSpec
from core.services import attempts, claims
from core.services.explanations import explain_job
from core.services.set_asides import list_set_asides
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from schedule.sweeper import settle, sweep
from tests.databases import Database, opened, run
from tests.factories.bases import POOL
from tests.factories.jobs import claim, queue_job, status_of
from tests.factories.tenants import Tenant, add_tenant
from tests.integration.poisoning import break_row, change, drop_checks
from tests.sessions import any_role_transaction
from tests.waiting import wait_until
from worker.supervisor.lease import LeaseKeeper


@pytest.fixture(scope="module", autouse=True)
def _unbounded(owner: Engine) -> None:
    drop_checks(owner, "tenants", "jobs", "usage", "attempts")


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    run(owner, "truncate jobs, queues, set_asides cascade")
    return worker


@pytest.fixture
def schedule(database: Database) -> Iterator[Engine]:
    with opened(database.schedule_url) as engine:
        yield engine


def claimed_by(worker: Engine, num_claims: int) -> list[uuid.UUID]:
    leases = [claim(worker) for _ in range(num_claims)]
    return [lease.tenant_id for lease in leases if lease is not None]


@pytest.mark.parametrize(
    "numbers",
    [
        {"weight": "1e-308"},
        {"weight": "1e-308", "usage": "1e10"},
        {"weight": "0"},
        {"weight": "'NaN'", "usage": "1"},
        {"weight": "'Infinity'", "usage": "1"},
        {"usage": "'NaN'"},
        {"usage": "'Infinity'"},
        {"usage": "1e308", "weight": "1e-300"},
        {"usage": "1e-300"},
        {"usage": "1", "usage_at": "now() - interval '3 years'"},
        {"usage": "1", "usage_at": "'-infinity'"},
        {"usage": "1", "usage_at": "'infinity'"},
    ],
    ids=str,
)
def test_a_tenant_of_nonsense_numbers_keeps_nobody_from_being_claimed_itself_included(
    worker: Engine, owner: Engine, tenant: Tenant, numbers: dict[str, str]
) -> None:
    other = add_tenant(owner)
    change(owner, "tenants", tenant.id, **numbers)
    for each in (tenant, other):
        queue_job(owner, each)
    assert set(claimed_by(worker, 2)) == {tenant.id, other.id}


def test_a_job_that_cannot_be_claimed_waits_aside_and_the_next_is_claimed(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    poisonous, sound = queue_job(owner, tenant), queue_job(owner, tenant)
    break_row(owner, "jobs", "id", poisonous.id)
    lease = claim(worker)
    assert lease is not None
    assert lease.job_id == sound.id
    with tenant_transaction(owner, tenant.id) as session:
        told = explain_job(session, tenant.id, job_id=poisonous.id, now=dt.datetime.now(dt.UTC), terms=FairnessTerms())
    assert told.reason is not None
    assert (told.reason.code, told.eta) == (WaitCode.UNCLAIMABLE, None)
    with service_transaction(worker) as session:
        assert claims.claimable_pools(session) == []


def test_a_job_that_its_worker_cannot_read_is_as_if_it_had_not_been_claimed(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    change(owner, "jobs", job.id, spec="""spec || '{"n_epochs": 0}'""")

    def read(row: Job) -> None:
        TrainingSpec.model_validate(row.spec)

    for num_failures in (1, 2):
        with service_transaction(worker) as session:
            none = claims.claim_job(session, POOL, worker_name="w", lease_seconds=60, prepare=read)
        assert none is None
        with any_role_transaction(owner) as session:
            (aside,) = list_set_asides(session)
            assert session.get_one(Job, job.id).attempt_count == 0
            assert session.scalars(select(Attempt)).all() == []
            session.execute(text("update set_asides set retry_at = now()"))
        assert (aside.num_failures, aside.row_id) == (num_failures, job.id)
        assert aside.reason == "n_epochs: Input should be greater than or equal to 1"
    change(owner, "jobs", job.id, spec="""spec || '{"n_epochs": 1}'""")
    assert claim(worker) is not None


@pytest.mark.parametrize("errcode", ["22003", "XX001"])
def test_a_lease_that_cannot_be_prolonged_keeps_no_other_from_being_prolonged(
    worker: Engine, owner: Engine, tenant: Tenant, errcode: str
) -> None:
    queue_job(owner, tenant)
    queue_job(owner, tenant)
    stuck, sound = claim(worker, 600), claim(worker, 600)
    assert stuck is not None
    assert sound is not None
    break_row(owner, "jobs", "id", stuck.job_id, errcode=errcode)

    def seconds_left(lease: Lease) -> float:
        with service_transaction(owner) as session:
            left = select(func.extract("epoch", Job.lease_until - func.now())).where(Job.id == lease.job_id)
            return float(session.scalars(left).one())

    keeper = LeaseKeeper(worker, lease_seconds=7200, heartbeat_seconds=0.1, is_live=lambda: True, fence=lambda: None)
    for lease in (stuck, sound):
        keeper.hold(lease, since=math.inf)  # never late
    wait_until(lambda: seconds_left(sound) > 600, what="a longer lease")
    assert seconds_left(stuck) <= 600
    for lease in (stuck, sound):
        keeper.let_go(lease)


@pytest.mark.parametrize("errcode", ["22003", "XX000", "XX001", "XX002"])
def test_a_lease_that_cannot_be_ended_keeps_no_other_from_ending(
    worker: Engine, schedule: Engine, owner: Engine, tenant: Tenant, errcode: str
) -> None:
    queue_job(owner, tenant)
    queue_job(owner, tenant)
    stuck, lost = claim(worker, -2), claim(worker, -1)
    assert stuck is not None
    assert lost is not None
    break_row(owner, "jobs", "id", stuck.job_id, errcode=errcode)
    with service_transaction(schedule) as session:
        attempts.expire_leases(session, limit=1)
    with service_transaction(schedule) as session:
        assert attempts.expire_leases(session, limit=1) == 1
    assert (status_of(owner, lost), status_of(owner, stuck)) == ("queued", "running")


def test_an_attempt_that_cannot_be_settled_keeps_no_other_from_being_booked(
    worker: Engine, schedule: Engine, owner: Engine, tenant: Tenant
) -> None:
    for _ in range(2):
        queue_job(owner, tenant)
        claim(worker, -1)
    with service_transaction(schedule) as session:
        attempts.expire_leases(session)
    with service_transaction(owner) as session:
        session.execute(text("update attempts set ended_at = ended_at - interval '11 minutes'"))
        first, second = session.scalars(select(Attempt).order_by(Attempt.lease_token)).all()
    break_row(owner, "usage", "attempt_id", first.id, verb="insert")
    settle(schedule)
    with service_transaction(owner) as session:
        assert session.scalars(select(Usage.attempt_id)).all() == [second.id]


def test_a_job_that_cannot_be_swept_keeps_no_other_from_being_swept(
    worker: Engine, schedule: Engine, owner: Engine, tenant: Tenant, servers: ServerAddresses
) -> None:
    for _ in range(2):
        queue_job(owner, tenant)
        lease = claim(worker)
        assert lease is not None
        with service_transaction(worker) as session:
            attempts.fail_attempt(session, lease, failure=Failure(code="x", message="x"), is_job_fault=True)
    with service_transaction(owner) as session:
        session.execute(text("update jobs set finished_at = now() - interval '2 days'"))
        stuck, swept = session.scalars(select(Job.id).order_by(Job.id)).all()
    break_row(owner, "jobs", "id", stuck)
    for _ in range(2):
        sweep(schedule, S3ObjectStore(servers.storage), min_age=dt.timedelta(days=1))
    with any_role_transaction(owner) as session:
        assert session.scalars(select(Job.id).where(Job.swept_at.is_not(None))).all() == [swept]
        (aside,) = list_set_asides(session)
    assert (aside.duty, aside.row_id, aside.num_failures) == (Duty.SWEEP, stuck, 1)


def test_an_operator_sees_what_is_set_aside_and_why(
    worker: Engine, owner: Engine, tenant: Tenant, database: Database
) -> None:
    job = queue_job(owner, tenant)
    break_row(owner, "jobs", "id", job.id)
    assert claim(worker) is None
    told = CliRunner().invoke(app, ["set-asides", "--json"], env={"ESPALIER_OWNER_DATABASE_URL": database.owner_url})
    assert told.exit_code == 0, told.output
    for word in ("claim", str(job.id), str(tenant.id), "value out of range: overflow"):
        assert word in told.stdout


def test_a_month_of_impossible_use_holds_its_tenant_and_no_other(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    other = add_tenant(owner)
    for _ in range(2):
        queue_job(owner, tenant)
        lease = claim(worker)
        assert lease is not None
        with service_transaction(worker) as session:
            attempts.fail_attempt(session, lease, failure=Failure(code="x", message="x"), is_job_fault=True)
    with service_transaction(owner) as session:
        session.execute(
            text("""
            insert into usage (id, tenant_id, attempt_id, gpu_seconds, trained_tokens)
            select gen_random_uuid(), tenant_id, id, 1e308, 0 from attempts
            """)
        )
        session.execute(text("update tenants set max_gpu_seconds_per_month = 10 where id = :id"), {"id": tenant.id})
    for each in (tenant, other):
        queue_job(owner, each)
    assert claimed_by(worker, 2) == [other.id]


def test_two_jobs_of_one_tenant_never_get_one_models_name(owner: Engine, tenant: Tenant) -> None:
    """The generator of ids is unlucky once: a trigger gives the second job the last eight digits of the first."""
    first = queue_job(owner, tenant)
    with service_transaction(owner) as session:
        session.execute(text("create sequence unlucky"))
        session.execute(text("grant usage on sequence unlucky to public"))
        session.execute(
            text(f"""
            create function draw_badly() returns trigger language plpgsql as $$
            begin
                if nextval('unlucky') = 1 then
                    new.id = overlay(new.id::text placing '{first.id.hex[-8:]}' from 29 for 8)::uuid;
                    new.name_digits = '{first.id.hex[-8:]}';
                end if;
                return new;
            end $$
            """)
        )
        session.execute(
            text("create trigger draw_badly before insert on jobs for each row execute function draw_badly()")
        )
    try:
        second = queue_job(owner, tenant)
    finally:
        with service_transaction(owner) as session:
            session.execute(text("drop function draw_badly cascade"))
            session.execute(text("drop sequence unlucky"))
    with service_transaction(owner) as session:
        assert session.get_one(Job, second.id).name_digits == second.id.hex[-8:] != first.id.hex[-8:]
