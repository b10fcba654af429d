"""Checks the promises I1-I10 on a live system. Each check counts what it looked at and names what breaks the promise.

The checks change and lock nothing. Each runs as one statement, which sees one moment, so work in progress is never
reported. Where rows cannot prove a promise wholly, the check covers the part that they show; docs/contract.md lists the
tests that prove the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import select, text

from core.db.models import Adapter, Checkpoint, File, ResumePoint
from core.db.session import AuditorSession
from core.domain.scheduling import USAGE_HALF_LIFE_SECONDS, FairnessTerms, slot_seconds
from core.domain.values import StoredArtifact
from core.storage import ObjectNotFoundError, ObjectStore, StoredObject

_MAX_SHOWN = 5
# Time to load a base, and time for which a job is left to another worker that is about to take it.
_LOAD_SECONDS = 180.0


@dataclass(frozen=True)
class Finding:
    """The result of one promise's check. `broken` names a few of the rows or objects that break it."""

    promise: str
    says: str
    num_checked: int
    num_broken: int
    broken: tuple[str, ...]


@dataclass(frozen=True)
class _Check:
    """`seen` is SQL that counts what is checked. `broken` is SQL that returns one text for each violation."""

    promise: str
    says: str
    seen: str
    broken: str


_CHECKS = (
    _Check(
        "I1",
        "No accepted job is forgotten: it is counted in its queue, under a lease that is watched, paused, or over.",
        "select count(*) from jobs",
        """select pool || ' of tenant ' || tenant_id || ' counts ' || coalesce(q.num_queued, 0) || ' queued and '
               || coalesce(q.num_paused, 0) || ' paused, not ' || coalesce(j.queued, 0) || ' and '
               || coalesce(j.paused, 0)
           from queues q full join (
               select pool, tenant_id, count(*) filter (where status = 'queued') as queued,
                   count(*) filter (where is_paused_or_pausing(status, pause_requested_at)) as paused
               from jobs group by pool, tenant_id
           ) j using (pool, tenant_id)
           where coalesce(q.num_queued, 0) <> coalesce(j.queued, 0)
              or coalesce(q.num_paused, 0) <> coalesce(j.paused, 0)
           union all select 'job ' || id || ' has an expired lease that nobody ends' from jobs
           where status = 'running' and lease_until < now() - interval '2 minutes'""",
    ),
    _Check(
        "I2",
        "Exactly one committed outcome a job: a success has one adapter and one successful attempt, others have none.",
        "select count(*) from jobs where finished_at is not null",
        """select 'job ' || j.id from jobs j
           where (select count(*) from attempts a where a.job_id = j.id and a.outcome = 'succeeded')
                 <> (j.status = 'succeeded')::int
              or (select count(*) from adapters d where d.job_id = j.id) <> (j.status = 'succeeded')::int""",
    ),
    _Check(
        # For steps: `f` has the last step of each attempt, and the first step of any newer attempt of the same job.
        # When a newer attempt begins, the numbers from its first step on are deleted. So an older attempt's step at or
        # beyond it was written too late. `offset 0` keeps the lateral query from being merged into the join.
        "I3",
        "Only the newest fence has written: leases, steps and artifacts are those of the attempt that held the job.",
        "select (select count(*) from attempts) + (select count(*) from metrics) + (select count(*) from checkpoints)",
        """select 'job ' || j.id || ' is held by an old attempt' from jobs j where j.status = 'running'
               and j.lease_token <> (select max(a.lease_token) from attempts a where a.job_id = j.id)
           union all select 'attempt ' || a.id || ' is open and does not hold its job' from attempts a
           join jobs j on j.id = a.job_id where a.outcome is null and j.lease_token is distinct from a.lease_token
           union all select 'step ' || m.step || ' of job ' || f.job_id from (
               select job_id, lease_token, max(step) as last_step, min(min(step)) over (
                   partition by job_id order by lease_token rows between 1 following and unbounded following
               ) as newer_since from metrics group by job_id, lease_token
           ) f cross join lateral (
               select step from metrics where job_id = f.job_id and lease_token = f.lease_token
                   and step >= f.newer_since offset 0
           ) m where f.newer_since <= f.last_step
           union all select 'adapter ' || d.id from adapters d where not exists (
               select from attempts a where a.job_id = d.job_id and a.outcome = 'succeeded' and d.object_prefix
                   = format('tenants/%s/jobs/%s/%s/adapter/', d.tenant_id, d.job_id, a.lease_token))
           union all select 'checkpoint ' || c.id from checkpoints c
           where not starts_with(
               c.object_prefix, format('tenants/%s/jobs/%s/%s/', c.tenant_id, c.job_id, c.lease_token))""",
    ),
    _Check(
        "I4",
        "A job that has ended stays as it ended: nothing of it began or was written afterwards.",
        "select count(*) from jobs where finished_at is not null",
        """select 'job ' || id from (
               select j.id from jobs j join attempts a on a.job_id = j.id
               where j.finished_at is not null and (a.outcome is null or a.started_at > j.finished_at)
               union select j.id from jobs j join (
                   select job_id, max(created_at) as last_at from metrics group by job_id
               ) m on m.job_id = j.id where m.last_at > j.finished_at
               union select j.id from jobs j join adapters d on d.job_id = j.id where d.created_at > j.finished_at
           ) written_later""",
    ),
    _Check(
        "I5",
        "No job has more attempts counted than its maximum.",
        "select count(*) from jobs",
        """select 'job ' || j.id from jobs j where j.attempt_count > j.max_attempts
              or exists (select from attempts a where a.job_id = j.id and a.number > j.max_attempts)""",
    ),
    _Check(
        "I6",
        "Usage is booked once an attempt, to the tenant whose it was.",
        "select count(*) from usage",
        """select 'attempt ' || a.id || ' has ' || count(u.id) || ' bookings' from attempts a
           left join usage u on u.attempt_id = a.id and u.tenant_id = a.tenant_id
           where a.ended_at < now() - interval '1 hour' group by a.id having count(u.id) <> 1
           union all select 'booking ' || u.id from usage u join attempts a on a.id = u.attempt_id
           where a.tenant_id <> u.tenant_id""",
    ),
    _Check(
        "I8",
        "No row points out of its tenant, and every table of tenants is behind forced row-level security.",
        "select (select count(*) from files) + (select count(*) from checkpoints) + (select count(*) from adapters)",
        """select 'file ' || id from files where not starts_with(object_key, 'tenants/' || tenant_id || '/')
           union all select 'checkpoint ' || id from checkpoints
           where not starts_with(object_prefix, 'tenants/' || tenant_id || '/')
           union all select 'adapter ' || id from adapters
           where not starts_with(object_prefix, 'tenants/' || tenant_id || '/')
           union all select 'table ' || c.relname from pg_class c
           join pg_attribute a on a.attrelid = c.oid and a.attname = 'tenant_id' and not a.attisdropped
           where c.relkind = 'r' and c.relnamespace = 'public'::regnamespace
             and not (c.relrowsecurity and c.relforcerowsecurity)""",
    ),
    _Check(
        "I9",
        "Nobody waits for longer than a turn, a quantum and a load while others who used more have the devices.",
        "select count(*) from jobs where status = 'queued'",
        """with waiting as (
               select j.id, j.pool, j.tenant_id, j.priority, j.run_after + make_interval(secs => :bound) as due_at,
                   t.weight, share_score(t.usage + t.lift, t.usage_at, t.weight, :half_life) as score,
                   (select count(*) from jobs r where r.tenant_id = t.id and r.status = 'running') < t.max_running
                       and within_gpu_quota(t.id, t.max_gpu_seconds_per_month) as may_start
               from jobs j join tenants t on t.id = j.tenant_id
               where j.status = 'queued' and j.suspect_step is null and t.disabled_at is null
                 and j.run_after < now() - make_interval(secs => :bound) and not exists (
                   select from attempts a join jobs o on o.id = a.job_id where o.tenant_id = j.tenant_id
                     and o.pool = j.pool and a.started_at > now() - make_interval(secs => :bound))
           ), served as (
               select a.tenant_id, a.started_at, a.stepping_at, a.outcome, o.id as job_id, o.priority, o.created_at,
                   w.name as worker, w.pools, t.weight,
                   share_score(t.usage + t.lift, t.usage_at, t.weight, :half_life) as score
               from attempts a join jobs o on o.id = a.job_id join tenants t on t.id = a.tenant_id
               join workers w on w.name = a.worker_name and w.alive_until > now() and not w.is_clock_wrong
               where a.outcome is null or a.started_at > now() - make_interval(secs => :bound)
           )
           select distinct 'tenant ' || q.tenant_id || ' waits in ' || q.pool || ' while a tenant that used more holds '
               || 'a slot of ' || s.worker
           from waiting q join served s on q.pool = any(s.pools) and s.tenant_id <> q.tenant_id
           where q.may_start and s.outcome is null and s.stepping_at < now() - make_interval(secs => :bound)
             and s.score > q.score + :slot_seconds / s.weight
           union select 'tenant ' || q.tenant_id || ' waits in ' || q.pool || ' while ' || s.worker
               || ' starts later jobs of a tenant that used more'
           from waiting q join served s on q.pool = any(s.pools) and s.tenant_id <> q.tenant_id
           where q.may_start and s.started_at > q.due_at and s.created_at > q.due_at
             and s.score > q.score + :slot_seconds / s.weight
           union select 'job ' || q.id || ' waits in ' || q.pool || ' while ' || s.worker
               || ' starts younger jobs of its tenant'
           from waiting q join served s on q.pool = any(s.pools) and s.tenant_id = q.tenant_id
           where s.started_at > q.due_at and s.job_id > q.id and s.priority <= q.priority""",
    ),
    _Check(
        "I10",
        "A cancelled job was off the device within 10 seconds, as its trainer reports.",
        "select count(*) from attempts where outcome = 'cancelled'",
        """select 'attempt ' || a.id || ' left ' || a.left_device_at - a.ended_at || ' later' from attempts a
           where a.outcome = 'cancelled' and a.left_device_at > a.ended_at + interval '10 seconds'
           union all select 'attempt ' || a.id || ' has not left ' || a.worker_name from attempts a
           join workers w on w.name = a.worker_name and w.alive_until > now() and w.started_at <= a.started_at
           where a.outcome = 'cancelled' and a.left_device_at is null
             and a.ended_at < now() - interval '10 seconds'""",
    ),
)


def check_rows(session: AuditorSession, terms: FairnessTerms) -> tuple[Finding, ...]:
    """Check every promise that rows can show: all but I7. `terms` are those of the workers."""
    return tuple(_ask(session, check, terms) for check in _CHECKS)


def check_objects(session: AuditorSession, store: ObjectStore, *, is_deep: bool) -> Finding:
    """Check I7: the objects that rows name are stored, with their size, and with `is_deep` byte for byte.

    The rows are read first. If an object is missing, its row is read again, because it may have been deleted meanwhile.
    """
    named = list(_named_objects(session))
    session.rollback()  # no transaction is open during requests to the object store
    suspects = [each for each in named if not _is_stored(store, each, is_deep=is_deep)]
    still_named = {each.object_key for each in _named_objects(session)} if suspects else set()
    broken = [each.object_key for each in suspects if each.object_key in still_named]
    says = "What a row names is stored, " + ("with the recorded sha256." if is_deep else "at the recorded size.")
    return Finding("I7", says, len(named), len(broken), tuple(broken[:_MAX_SHOWN]))


@dataclass(frozen=True)
class _NamedObject:
    object_key: str
    stored: StoredObject


def _ask(session: AuditorSession, check: _Check, terms: FairnessTerms) -> Finding:
    num_checked = session.scalars(text(check.seen)).one()
    values = {
        "bound": terms.turn_seconds + terms.quantum_seconds + _LOAD_SECONDS,
        "half_life": USAGE_HALF_LIFE_SECONDS,
        "slot_seconds": slot_seconds(terms.quantum_seconds),
    }
    asked = text(check.broken)
    broken: Sequence[str] = session.scalars(asked, {name: values[name] for name in asked.compile().params}).all()
    return Finding(check.promise, check.says, num_checked, len(broken), tuple(broken[:_MAX_SHOWN]))


def _named_objects(session: AuditorSession) -> Iterator[_NamedObject]:
    files = select(File.object_key, File.size_bytes, File.sha256).where(File.deleted_at.is_(None))
    for object_key, size_bytes, sha256 in session.execute(files):
        yield _NamedObject(object_key, StoredObject(size_bytes, sha256))
    for model in (Adapter, Checkpoint):
        for prefix, stored in session.execute(
            select(model.object_prefix, model.files).where(model.deleted_at.is_(None))
        ):
            yield from _named_files(StoredArtifact.of_row(prefix, stored))
    for prefix, stored in session.execute(select(ResumePoint.object_prefix, ResumePoint.files)):
        yield from _named_files(StoredArtifact.of_row(prefix, stored))


def _named_files(artifact: StoredArtifact) -> Iterator[_NamedObject]:
    for file in artifact.files:
        yield _NamedObject(artifact.object_prefix + file.name, StoredObject(file.size_bytes, file.sha256))


def _is_stored(store: ObjectStore, named: _NamedObject, *, is_deep: bool) -> bool:
    if not is_deep:
        return store.stat(named.object_key) == named.stored.size_bytes
    try:
        return store.hash_object(named.object_key) == named.stored
    except ObjectNotFoundError:
        return False
