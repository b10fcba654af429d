"""A world in which tenants and workers write words everywhere, and a search for a word in all of it."""

from __future__ import annotations

import datetime as dt
import json
import secrets
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
from openai import OpenAI
from sqlalchemy import Engine, text

from core.db.session import service_transaction
from core.domain.failures import Failure
from core.domain.files import NewFile
from core.domain.ids import IdKind, new_id, parse_id
from core.domain.leases import Lease
from core.domain.objects import attempt_prefix, tenant_prefix
from core.domain.scheduling import FairnessTerms
from core.domain.values import StoredArtifact, StoredFile
from core.services import attempts, charges, checkpoints, resume_points
from core.services.logs import record_log_line
from core.services.promises import check_objects, check_rows
from core.services.usage import UsageGroup, UsagePeriod, UsageTotal, sum_usage
from core.storage import S3ObjectStore
from schedule.eraser import erase
from schedule.purger import purge
from schedule.sweeper import sweep
from tests.factories.bases import BASE_MODEL
from tests.factories.jobs import claim
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction

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
        with any_role_transaction(self.owner) as session:
            findings = [*check_rows(session, FairnessTerms()), check_objects(session, self.store, is_deep=True)]
        return [f"{finding.promise} {broken}" for finding in findings for broken in finding.broken]

    def used_seconds(self) -> float:
        return sum(total.gpu_seconds for total in self.used())

    def used(self) -> list[UsageTotal]:
        today = dt.datetime.now(dt.UTC).date()
        with any_role_transaction(self.owner) as session:
            return list(sum_usage(session, UsagePeriod(today, today), group=UsageGroup.POOL, limit=10).items)


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
        attempts.fail_attempt(session, lease, failure=Failure(code="x", message=f"Not {word}."), is_job_fault=True)
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
