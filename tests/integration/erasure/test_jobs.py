"""What was deleted is gone: proven by a search of every column of every table and of every object, for its words."""

from __future__ import annotations

import datetime as dt
import json
import secrets
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import ProgrammingError

from core.db.models import Job
from core.db.session import connect, operator_transaction, service_transaction
from core.domain.api_keys import ALL_SCOPES
from core.domain.duties import Duty
from core.domain.errors import ConflictError, NotFoundError
from core.domain.files import NewFile
from core.domain.ids import IdKind, new_id, parse_id
from core.domain.leases import Lease, StaleLeaseError
from core.domain.objects import attempt_prefix, tenant_prefix
from core.domain.scheduling import FairnessTerms
from core.domain.values import StoredArtifact, StoredFile
from core.services import attempts, charges, checkpoints, leases, observations, resume_points
from core.services.api_keys import issue_api_key
from core.services.checkpoints import revoke_permission, share_checkpoint
from core.services.erasure import BEGINNING, Place, erase_some_jobs, erase_some_of_tenant
from core.services.job_rows import BATCH_ROWS
from core.services.logs import record_log_line
from core.services.observations import StepRecord
from core.services.promises import check_objects, check_rows
from core.services.set_asides import set_aside
from core.services.tenants import TenantChange, change_tenant, create_tenant, delete_tenant, find_tenant
from core.services.usage import UsageGroup, UsagePeriod, UsageTotal, sum_usage
from core.storage import S3ObjectStore
from schedule.eraser import erase
from schedule.purger import purge
from schedule.sweeper import sweep
from tests.integration.conftest import BASE_MODEL, Database, Tenant
from tests.integration.test_attempts import claim
from tests.waiting import wait_until

NO_AGE = dt.timedelta(0)
TABLES = """
select c.relname from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') order by 1
"""


@dataclass(frozen=True)
class World:
    """What the scenarios need: the owner's eyes, everybody's hands, and the API."""

    owner: Engine
    operator: Engine
    worker: Engine
    schedule: Engine
    store: S3ObjectStore
    api_url: str

    def client(self, tenant: Tenant) -> OpenAI:
        return OpenAI(base_url=f"{self.api_url}/v1", api_key=tenant.api_key, max_retries=0)

    def ask(self, tenant: Tenant, verb: str, path: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {tenant.api_key}"}
        return httpx.request(verb, f"{self.api_url}{path}", headers=headers, trust_env=False, timeout=60)

    def find(self, word: str) -> Counter[str]:
        """Return where a word is in the whole database, as text or as bytes, and in the bucket."""
        found: Counter[str] = Counter()
        values = {"word": word.lower(), "hex": word.encode().hex()}
        with service_transaction(self.owner) as session:
            for table in session.scalars(text(TABLES)).all():
                holds = (
                    f"select count(*) from {table} t where strpos(lower(t::text), :word) + strpos(t::text, :hex) > 0"
                )
                found[table] = session.scalars(text(holds), values).one()
        for key in self.store.list_keys(""):
            found["keys"] += word in key
        for tenant_id in self._tenant_ids():
            for key in self.store.list_keys(tenant_prefix(tenant_id)):
                found["contents"] += word.encode() in b"".join(self.store.get_stream(key))
        return +found

    def _tenant_ids(self) -> Sequence[uuid.UUID]:
        with service_transaction(self.owner) as session:
            return session.scalars(text("select id from tenants")).all()

    def erase(self, *, min_age: dt.timedelta = NO_AGE) -> None:
        erase(self.schedule, self.store, min_age=min_age, may_go_on=lambda _: True)

    def run_duties(self, *, min_age: dt.timedelta = NO_AGE, num_rounds: int = 4) -> None:
        """Let the schedule do all that is due, by default as if much time passed between its rounds."""
        for _ in range(num_rounds):
            self.erase(min_age=min_age)
            purge(self.schedule, self.store, may_go_on=lambda _: True)
            sweep(self.schedule, self.store, min_age=min_age)

    def find_broken(self) -> list[str]:
        with service_transaction(self.owner) as session:
            findings = [*check_rows(session, FairnessTerms()), check_objects(session, self.store, is_deep=True)]
        return [f"{finding.promise} {broken}" for finding in findings for broken in finding.broken]

    def used_seconds(self) -> float:
        return sum(total.gpu_seconds for total in self.used())

    def used(self) -> list[UsageTotal]:
        today = dt.datetime.now(dt.UTC).date()
        with service_transaction(self.owner) as session:
            return list(sum_usage(session, UsagePeriod(today, today), group=UsageGroup.POOL, limit=10).items)


@pytest.fixture
def world(
    database: Database, schedule: Engine, owner: Engine, worker: Engine, store: S3ObjectStore, api_url: str
) -> Iterator[World]:
    operator = connect(database.api_url)
    yield World(owner, operator, worker, schedule, store, api_url)
    operator.dispose()


def make_word() -> str:
    return "w" + secrets.token_hex(5)


def upload_dataset(world: World, tenant: Tenant, word: str) -> str:
    said = [{"role": role, "content": word} for role in ("user", "assistant")]
    row = json.dumps({"messages": said}) + "\n"
    with world.client(tenant) as client:
        return client.files.create(file=(f"{word}.jsonl", row.encode() * 4), purpose="fine-tune").id


def submit(world: World, tenant: Tenant, file_id: str, word: str) -> str:
    """Submit a job that has the word wherever a tenant can put one."""
    with world.client(tenant) as client:
        return client.fine_tuning.jobs.create(
            model=BASE_MODEL,
            training_file=file_id,
            suffix=word,
            metadata={word: word},
            seed=int(word[1:], 16) % 2**31,
            extra_headers={"Idempotency-Key": word},
        ).id


def start(world: World, job_id: str) -> Lease:
    """Claim the one job that is queued, and let its worker tell of it in the word."""
    lease = claim(world.worker)
    assert lease is not None
    assert lease.job_id == parse_id(IdKind.JOB, job_id)
    return lease


def put(world: World, key: str, word: str) -> tuple[StoredFile, ...]:
    stored = world.store.put_bytes(key, word.encode(), content_type="text/plain")
    return (StoredFile(name=key.rpartition("/")[2], size_bytes=stored.size_bytes, sha256=stored.sha256),)


def tell(world: World, lease: Lease, word: str) -> None:
    """Write the word wherever a worker writes, with objects that rows name and one that none does."""
    prefix = attempt_prefix(lease.tenant_id, lease.job_id, lease.token)
    with service_transaction(world.worker) as session:
        record_log_line(session, lease.token, name=word, level="info", details={word: word})
        attempts.record_message(session, lease, message=f"About {word}.", level="info")
        resume = StoredArtifact(prefix + "resume/1/", put(world, f"{prefix}resume/1/{word}", word))
        resume_points.record_resume_point(session, lease, step=1, artifact=resume)
        checkpoint = StoredArtifact(
            prefix + "checkpoints/step-1/", put(world, f"{prefix}checkpoints/step-1/{word}", word)
        )
        checkpoints.record_checkpoint(session, lease, step=1, artifact=checkpoint, metrics={word: 1})
    put(world, f"{prefix}left/{word}", word)
    run_statement(world.owner, f"update jobs set datasets = '{{\"{word}\": 1}}', traceparent = '{word}'", lease)


def run_statement(owner: Engine, statement: str, lease: Lease) -> None:
    with service_transaction(owner) as session:
        session.execute(text("set local session_replication_role = replica"))  # nobody's change, in no audit log
        session.execute(text(f"{statement} where id = '{lease.job_id}'"))


def succeed(world: World, lease: Lease, word: str) -> None:
    prefix = attempt_prefix(lease.tenant_id, lease.job_id, lease.token)
    adapter = StoredArtifact(prefix + "adapter/", put(world, f"{prefix}adapter/{word}", word))
    key = f"{prefix}result/result.csv"
    (stored,) = put(world, key, word)
    result = NewFile(new_id(), f"{word}.csv", "fine-tune-results", key, stored.size_bytes, stored.sha256)
    with service_transaction(world.worker) as session:
        attempts.succeed_attempt(session, lease, adapter=adapter, result_file=result, trained_tokens=1)
        charges.record_usage(session, lease.token, gpu_seconds=5, trained_tokens=7)


def fail(world: World, lease: Lease, word: str) -> None:
    with service_transaction(world.worker) as session:
        attempts.fail_attempt(session, lease, code="x", message=f"Not {word}.", is_job_fault=True)
        charges.record_usage(session, lease.token, gpu_seconds=3, trained_tokens=0)


def train(world: World, tenant: Tenant, file_id: str, word: str, *, is_success: bool = True) -> tuple[str, Lease]:
    """Submit a job and let it end; a success is shared with somebody by that name."""
    job_id = submit(world, tenant, file_id, word)
    lease = start(world, job_id)
    tell(world, lease, word)
    (succeed if is_success else fail)(world, lease, word)
    if is_success:
        with world.client(tenant) as client:
            (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job_id).data
        body = {"project_ids": [word]}
        name = checkpoint.fine_tuned_model_checkpoint
        path = f"{world.api_url}/v1/fine_tuning/checkpoints/{name}/permissions"
        headers = {"authorization": f"Bearer {tenant.api_key}"}
        httpx.post(path, json=body, headers=headers, trust_env=False, timeout=60).raise_for_status()
    return job_id, lease


@pytest.mark.parametrize("is_success", [True, False])
def test_of_a_job_that_its_tenant_deletes_no_word_is_left_anywhere_and_its_bill_stays(
    world: World, tenant: Tenant, *, is_success: bool
) -> None:
    doomed, kept, dataset = make_word(), make_word(), make_word()
    file_id = upload_dataset(world, tenant, dataset)
    job_id, _ = train(world, tenant, file_id, doomed, is_success=is_success)
    train(world, tenant, file_id, kept, is_success=is_success)
    world.run_duties()
    everywhere, used, broken = world.find(kept), world.used(), world.find_broken()
    assert {"jobs", "events", "log_lines", "idempotency_keys", "audit_entries", "checkpoints"} <= set(everywhere)
    assert ({"adapters", "files", "checkpoint_permissions"} <= set(everywhere)) == is_success
    assert world.find(doomed) == everywhere
    of_dataset = world.find(dataset)
    answer = world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}")
    assert answer.json() == {"id": job_id, "object": "fine_tuning.job", "deleted": True}
    world.run_duties()
    assert world.find(doomed) == Counter()
    assert world.find(kept) == everywhere
    assert world.find(dataset) == of_dataset
    assert world.find(parse_id(IdKind.JOB, job_id).hex) == Counter()
    assert world.used() == used
    assert world.find_broken() == broken == []
    with service_transaction(world.owner) as session:
        actions = text("select action from audit_entries where subject = :id order by number")
        assert session.scalars(actions, {"id": str(parse_id(IdKind.JOB, job_id))}).all() == [
            "job.created",
            "job.deleted",
        ]


def test_a_job_that_waits_for_late_writes_has_no_word_left_in_any_table_and_is_seen_by_nobody(
    world: World, tenant: Tenant
) -> None:
    word = make_word()
    job_id, lease = train(world, tenant, upload_dataset(world, tenant, make_word()), word)
    with world.client(tenant) as client:
        model = client.fine_tuning.jobs.retrieve(job_id).fine_tuned_model
    assert world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}").status_code == 200
    for path in ("", "/events", "/checkpoints", "/logs", "/metrics", "/stream", "/explain"):
        assert world.ask(tenant, "GET", f"/v1/fine_tuning/jobs/{job_id}{path}").status_code == 404, path
    assert world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}").status_code == 404
    for path in ("/v1/fine_tuning/jobs", "/v1/adapters"):
        assert world.ask(tenant, "GET", path).json()["data"] == [], path
    assert world.ask(tenant, "GET", f"/v1/models/{model}").status_code == 404
    world.erase()
    assert set(world.find(word)) == {"keys", "contents", "resume_points"}
    purge(world.schedule, world.store, may_go_on=lambda _: True)
    world.erase()
    assert world.find(word) == Counter(keys=1, contents=1), "what no row names waits for the sweep, and the row with it"
    with service_transaction(world.owner) as session:
        assert session.scalars(select(Job.id)).all() == [lease.job_id]
    assert world.find_broken() == []


def test_only_a_job_that_has_ended_can_be_deleted_and_only_by_its_tenant(
    world: World, tenant: Tenant, other_tenant: Tenant
) -> None:
    job_id = submit(world, tenant, upload_dataset(world, tenant, make_word()), make_word())
    for status in ("queued", "running"):
        answer = world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_not_ended"), status
        assert "Cancel it first" in answer.json()["error"]["message"]
        if status == "queued":
            start(world, job_id)
    assert world.ask(tenant, "POST", f"/v1/fine_tuning/jobs/{job_id}/cancel").status_code == 200
    assert world.ask(other_tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}").status_code == 404
    assert world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}").status_code == 200


def test_the_key_of_a_deleted_job_and_its_words_stand_for_a_new_job(world: World, tenant: Tenant) -> None:
    word = make_word()
    file_id = upload_dataset(world, tenant, word)
    job_id, _ = train(world, tenant, file_id, word, is_success=False)
    world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}")
    assert submit(world, tenant, file_id, word) != job_id


def test_a_long_history_goes_a_thousand_rows_at_a_time_however_often_it_is_interrupted(
    world: World, tenant: Tenant
) -> None:
    word = make_word()
    job_id, lease = train(world, tenant, upload_dataset(world, tenant, make_word()), word)
    add = f"""
        insert into events (id, tenant_id, job_id, level, type, message)
        select gen_random_uuid(), tenant_id, id, 'info', 'message', '{word}' from jobs, generate_series(1, 2500)
    """
    run_statement(world.owner, add, lease)
    world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}")
    sizes = []
    place: Place | None = BEGINNING
    while place is not None:
        with service_transaction(world.schedule) as session:
            num_rows, place = erase_some_jobs(session, after=BEGINNING)  # as after an interruption
        sizes.append(num_rows.total())
    assert sizes[:2] == [BATCH_ROWS, BATCH_ROWS]
    assert max(sizes) <= BATCH_ROWS + 10
    world.run_duties()
    assert world.find(word) == Counter()


def test_the_schedule_can_delete_and_blank_nothing_of_what_nobody_has_deleted(world: World, tenant: Tenant) -> None:
    word = make_word()
    _, lease = train(world, tenant, upload_dataset(world, tenant, make_word()), word)
    world.run_duties()
    everywhere = world.find(word)
    with service_transaction(world.schedule) as session:
        for table in ("events", "log_lines", "checkpoint_permissions", "api_keys", "queues", "storage_totals", "files"):
            session.execute(text(f"delete from {table}"))
        session.execute(text("select blank_audit_entries_of_job(:id)"), {"id": lease.job_id})
        session.execute(text("select blank_audit_entries_of_tenant(:id, 1000)"), {"id": tenant.id})
    assert world.find(word) == everywhere
    with pytest.raises(ProgrammingError, match="permission denied"), service_transaction(world.worker) as session:
        session.execute(text("select blank_audit_entries_of_job(:id)"), {"id": lease.job_id})


@dataclass(frozen=True)
class Full:
    """A tenant that has one of everything, each with its word in it, and two jobs under way."""

    tenant: Tenant
    word: str
    file_id: str
    leased: Lease


def fill_tenant(world: World) -> Full:
    word = make_word()
    with service_transaction(world.owner) as session:
        tenant_id = create_tenant(session, word, name=f"The {word}").id
        issued = issue_api_key(session, tenant_id, name=word, scopes=ALL_SCOPES).api_key
    tenant = Tenant(tenant_id, word, str(issued), issued.key_id)
    file_id = upload_dataset(world, tenant, word)
    for digit, is_success in ((0, True), (1, False)):
        train(world, tenant, file_id, f"{word}{digit}", is_success=is_success)
    upload_in_parts(world, tenant, word)
    lease = start(world, submit(world, tenant, file_id, f"{word}2"))
    tell(world, lease, word)
    submit(world, tenant, file_id, f"{word}3")
    with service_transaction(world.owner) as session:
        set_aside(session, Duty.CLAIM, row_id=lease.job_id, tenant_id=tenant_id, error=ValueError(word))
    return Full(tenant, word, file_id, lease)


def upload_in_parts(world: World, tenant: Tenant, word: str) -> None:
    """Leave an upload with a part in it, and a multipart upload that was begun behind the tenant's prefix."""
    with world.client(tenant) as client:
        upload = client.uploads.create(bytes=1000, filename=word, mime_type="text/plain", purpose="fine-tune")
        client.uploads.parts.create(upload.id, data=word.encode())


def delete_by_operator(world: World, slug: str) -> str:
    with operator_transaction(world.operator, actor="operator:tests") as session:
        return delete_tenant(session, slug).slug


def postpone_queued(world: World) -> None:
    with service_transaction(world.owner) as session:
        session.execute(text("update jobs set run_after = now() + interval '1 day' where status = 'queued'"))


def book(world: World, lease: Lease) -> None:
    """Let a worker that has learnt of the end of its job book what it used."""
    with service_transaction(world.worker) as session:
        charges.record_usage(session, lease.token, gpu_seconds=11, trained_tokens=0)


def test_of_a_tenant_that_an_operator_deletes_no_word_is_left_anywhere_but_its_bill_and_its_tombstone(
    world: World,
) -> None:
    doomed = fill_tenant(world)
    postpone_queued(world)
    kept = fill_tenant(world)
    share_with(world, kept, doomed)
    named = set(world.find(doomed.word))
    assert named >= {
        "tenants",
        "api_keys",
        "files",
        "uploads",
        "jobs",
        "adapters",
        "checkpoints",
        "events",
        "log_lines",
    }
    assert named >= {
        "idempotency_keys",
        "set_asides",
        "audit_entries",
        "checkpoint_permissions",
        "attempts",
        "contents",
    }
    world.run_duties()
    everywhere, seconds = world.find(kept.word), world.used_seconds()
    new_slug = delete_by_operator(world, doomed.word)
    world.erase()
    assert set(world.find(doomed.word)) <= {"keys", "contents", "resume_points"}, (
        "no row names it from the first round on"
    )
    book(world, doomed.leased)
    world.run_duties()
    assert world.find(doomed.word) == Counter()
    assert world.find(kept.word) == everywhere
    assert world.find_broken() == []
    assert rows_of(world, doomed.tenant) == {"audit_entries", "usage"}
    assert list(world.store.list_keys(tenant_prefix(doomed.tenant.id))) == []
    assert world.used_seconds() == seconds + 11
    with service_transaction(world.owner) as session:
        row = find_tenant(session, new_slug)
        assert (row.name, row.erased_at is None) == ("deleted", False)
        query = "select actor, subject, before, after from audit_entries where action = 'tenant.deleted'"
        assert session.execute(text(query)).all() == [("operator:tests", new_slug, {}, {})]


def test_the_keys_of_a_deleted_tenant_are_refused_and_its_worker_writes_nothing_any_more(world: World) -> None:
    doomed = fill_tenant(world)
    new_slug = delete_by_operator(world, doomed.word)
    wait_until(lambda: world.ask(doomed.tenant, "GET", "/v1/files").status_code == 401)
    world.erase()
    record = StepRecord(2, 1.0, train_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, num_tokens=10)
    with service_transaction(world.worker) as session:
        with pytest.raises(StaleLeaseError):
            leases.heartbeat(session, doomed.leased, lease_seconds=60)
        with pytest.raises(StaleLeaseError):
            observations.record_step(session, doomed.leased, record=record, total_steps=5)
        with pytest.raises(StaleLeaseError):
            attempts.fail_attempt(session, doomed.leased, code="x", message=doomed.word, is_job_fault=True)
    assert claim(world.worker) is None
    with operator_transaction(world.operator, actor="operator:tests") as session:
        with pytest.raises(ConflictError, match="is deleted"):
            change_tenant(session, new_slug, change=TenantChange(is_disabled=False))
        with pytest.raises(ConflictError, match="is deleted"):
            issue_api_key(session, doomed.tenant.id, name="again")
        with pytest.raises(ConflictError, match="is deleted"):
            delete_tenant(session, new_slug)
        with pytest.raises(NotFoundError):
            delete_tenant(session, doomed.word)


def test_whoever_gets_the_slug_of_a_deleted_tenant_gets_nothing_that_was_shared_with_it(world: World) -> None:
    doomed = fill_tenant(world)
    postpone_queued(world)
    kept = fill_tenant(world)
    name = share_with(world, kept, doomed)
    delete_by_operator(world, doomed.word)
    with service_transaction(world.owner) as session:
        tenant_id = create_tenant(session, doomed.word).id
        issued = issue_api_key(session, tenant_id, name="x", scopes=ALL_SCOPES).api_key
    heir = Tenant(tenant_id, doomed.word, str(issued), issued.key_id)
    assert world.ask(kept.tenant, "GET", f"/v1/models/{name}").status_code == 200
    assert world.ask(heir, "GET", f"/v1/models/{name}").status_code == 404


def test_the_erasure_of_a_tenant_ends_the_same_however_often_it_is_interrupted(world: World) -> None:
    doomed = fill_tenant(world)
    add_rows(world, doomed, 2300)
    delete_by_operator(world, doomed.word)
    batches = []
    for _ in range(200):  # one transaction at a time, and each round begins anew
        with service_transaction(world.schedule) as session:
            batches.append(erase_some_of_tenant(session, doomed.tenant.id))
        with service_transaction(world.schedule) as session:
            num_rows, place = erase_some_jobs(session, after=BEGINNING)
        if not batches[-1] and not num_rows and place is None:
            break
    assert max(each.total() for each in batches) <= BATCH_ROWS + 100
    book(world, doomed.leased)
    world.run_duties()
    assert world.find(doomed.word) == Counter()
    assert rows_of(world, doomed.tenant) == {"audit_entries", "usage"}


def add_rows(world: World, full: Full, num: int) -> None:
    """Give a tenant many files that are gone, and as many entries in the audit log."""
    values = {"tenant": full.tenant.id, "num": num, "word": full.word}
    with service_transaction(world.owner) as session:
        session.execute(
            text("""
            insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status,
                deleted_at, purged_at)
            select gen_random_uuid(), :tenant, :word, 'fine-tune', 0, repeat('0', 64), 'tenants/' || :tenant || '/', 1,
                'processed', now(), now() from generate_series(1, :num)
            """),
            values,
        )


def test_a_tenant_is_said_to_be_erased_only_once_nothing_can_be_written_late(world: World) -> None:
    doomed = fill_tenant(world)
    new_slug = delete_by_operator(world, doomed.word)
    world.erase()
    book(world, doomed.leased)
    world.run_duties(min_age=dt.timedelta(days=1), num_rounds=1)
    with service_transaction(world.owner) as session:
        session.execute(text("update jobs set swept_at = now()"))
    world.run_duties(min_age=dt.timedelta(days=1))
    assert rows_of(world, doomed.tenant) == {"audit_entries", "usage"}
    late = f"{tenant_prefix(doomed.tenant.id)}files/late"
    put(world, late, doomed.word)
    with service_transaction(world.owner) as session:
        assert find_tenant(session, new_slug).erased_at is None
    world.run_duties()
    assert world.store.stat(late) is None
    with service_transaction(world.owner) as session:
        assert find_tenant(session, new_slug).erased_at is not None


def share_with(world: World, giver: Full, receiver: Full) -> str:
    """Share a checkpoint with a tenant by its slug, having taken it back once before; return the checkpoint's name."""
    query = text("select model_name from checkpoints where tenant_id = :id order by id limit 1")
    with service_transaction(world.owner) as session:
        name = session.scalars(query, {"id": giver.tenant.id}).one()
        (permission,) = share_checkpoint(session, giver.tenant.id, name=name, project_ids=[receiver.tenant.slug])[-1:]
        revoke_permission(session, giver.tenant.id, name=name, permission_id=permission.id)
        share_checkpoint(session, giver.tenant.id, name=name, project_ids=[receiver.tenant.slug])
        return str(name)


def rows_of(world: World, tenant: Tenant) -> set[str]:
    """Return the tables that have a row of a tenant, by the catalogue."""
    query = text(TABLES.replace("where", "join pg_attribute a on a.attrelid = c.oid and a.attname = 'tenant_id' where"))
    with service_transaction(world.owner) as session:
        holds = "select count(*) from {} where tenant_id = :id"
        tables = session.scalars(query).all()
        return {name for name in tables if session.scalar(text(holds.format(name)), {"id": tenant.id})}
