"""Whose turn it is: which pool a worker serves next, and which slot is lent to a waiting tenant.

Both decisions follow the order of fair share (core.domain.scheduling).

| the next job is in | a worker |
|---|---|
| the pool that it holds | keeps its base |
| another pool, which no other worker is about to serve | switches to that pool |
| another pool, which another worker is about to serve | keeps its base until the job has waited `_LEFT_SECONDS` |
| the same, and more jobs wait than those other workers have room for | switches to that pool |
| another pool, and its tenant has used more than every tenant that holds a slot here | keeps its base |

Without the third rule every worker would switch its base for one job. Another worker is about to serve a pool when it
loads the base, or holds it and has a free slot. A busy worker also counts idle workers.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert

from core.db.locks import lock
from core.db.models import Attempt, Pool, Worker
from core.db.session import ServiceSession
from core.domain.jobs import SUSPECT_PATIENCE_SECONDS
from core.domain.scheduling import TURN_SECONDS, USAGE_HALF_LIFE_SECONDS
from core.domain.training import MAX_SKIPPED_STEPS

# For this long a job is left to another worker that seems to be about to take it.
_LEFT_SECONDS = 60.0
# A slot is lent only if the scores differ by more than this part of a slot's use in a quantum. So two tenants with
# equal scores do not exchange their slots again and again.
_MARGIN = 0.5
# At most this many tenants, lowest scores first, are looked at when the slots are counted that others wait for.
_MAX_WAITING_TENANTS = 100
_MAX_READY_JOBS = 64

# Condition: the jobs of tenant `t` may start now.
MAY_START = """
t.disabled_at is null and within_gpu_quota(t.id, t.max_gpu_seconds_per_month)
  and within_storage_quota(t.id, t.max_storage_bytes)
  and (select count(*) from jobs r where r.tenant_id = t.id and r.status = 'running') < t.max_running
"""
# Condition: the base of pool `p` is not known to be unusable. A pool's name begins with its base.
IS_USABLE = """
not exists (select from base_models b where b.id = split_part(p.name, '@', 1) and b.state = 'unusable')
"""
# Condition: job `j` is not set aside.
IS_IN_REACH = """
not exists (select from set_asides s where s.duty = 'claim' and s.row_id = j.id and s.retry_at > now())
"""
# Condition: `w` is another worker that will soon take jobs of pool `p.name`.
_IS_ABOUT_TO_SERVE = """
w.alive_until > now() and w.state <> 'stopping' and not w.is_clock_wrong and w.name <> :worker
and p.name = any(w.pools)
and not jsonb_exists(w.refusals, p.name) and (
    w.next_pool = p.name or (w.pool = p.name and (w.state = 'loading' or w.slots_in_use < w.slots))
    or (w.state = 'idle' and w.next_pool is null and w.pool is distinct from p.name and :counts_idle))
"""
# Condition: job `j`, which must be tried alone, has waited so long that a busy worker takes it.
_HAS_PATIENCE = f"j.run_after <= now() - make_interval(secs => {SUSPECT_PATIENCE_SECONDS})"
# Condition: more jobs of pool `p.name` may start than the workers that are about to serve it have room for. Both counts
# are bounded: `_MAX_WAITING_TENANTS` tenants in the order of the queue's index, and `_MAX_READY_JOBS` jobs of each.
_EXCEEDS_THEIR_ROOM = f"""
(select sum(ready.num_jobs) from (
        select q.pool, q.tenant_id from queues q where q.pool = p.name and q.num_queued > 0
        order by q.rank, q.tenant_id limit {_MAX_WAITING_TENANTS}) q
    join tenants t on t.id = q.tenant_id
    cross join lateral (
        select least(count(*), t.max_running - (
            select count(*) from jobs r where r.tenant_id = t.id and r.status = 'running')) as num_jobs
        from (
            select from jobs j
            where j.pool = q.pool and j.tenant_id = q.tenant_id and j.status = 'queued' and j.run_after <= now()
              and j.suspect_step is null and {IS_IN_REACH}
            limit {_MAX_READY_JOBS}) j) ready
    where {MAY_START})
> (select sum(case when w.pool = p.name and w.state <> 'loading' then w.slots - w.slots_in_use else b.slots end)
    from workers w join base_models b on b.id = split_part(p.name, '@', 1) where {_IS_ABOUT_TO_SERVE})
"""  # noqa: S608 (of constants)
# One row for each of the worker's pools: the first job of the fairest tenant there, found through the index on `queues`
# and the partial index of queued jobs. The outer order then picks the fairest tenant over all pools. Of two pools with
# the same tenant, the one with that tenant's job of higher priority wins.
_FAIREST = text(f"""
select p.name as pool, c.tenant_id, c.id as job_id, c.rank,
    cardinality(cast(:holders as uuid[])) > 0 and not exists (
        select from tenants h where h.id = any(cast(:holders as uuid[]))
          and share_score(h.usage + h.lift, h.usage_at, h.weight, :half_life) >= c.score + (
            -- What the workers that are on their way there will use in a turn: else all would move for one tenant.
            select count(*) * :turn / c.weight from workers w
            where w.alive_until > now() and not w.is_clock_wrong and w.name <> :worker and p.name <> cast(:pool as text)
              and (w.next_pool = p.name or (w.pool = p.name and w.state = 'loading')))) as is_behind
from unnest(cast(:pools as text[])) as p (name)
cross join lateral (
    select q.tenant_id, q.rank, j.id, j.priority, j.run_after, t.weight,
        share_score(t.usage + t.lift, t.usage_at, t.weight, :half_life) as score
    from queues q join tenants t on t.id = q.tenant_id
    cross join lateral (
        select j.id, j.priority, j.run_after from jobs j
        where j.pool = q.pool and j.tenant_id = q.tenant_id and j.status = 'queued' and j.run_after <= now()
          and {IS_IN_REACH} and (j.suspect_step is null or cardinality(cast(:holders as uuid[])) = 0 or {_HAS_PATIENCE})
        order by j.priority desc, j.id limit 1
    ) j
    where q.pool = p.name and q.num_queued > 0 and {MAY_START}
    order by q.rank, q.tenant_id limit 1
) c
where {IS_USABLE} and (p.name = cast(:pool as text) or c.run_after <= now() - make_interval(secs => :left)
  or not exists (select from workers w where {_IS_ABOUT_TO_SERVE}) or {_EXCEEDS_THEIR_ROOM})
order by coalesce(p.name = cast(:pool as text) and :keeps_pool, false) desc, c.rank, c.tenant_id, c.priority desc, c.id
limit 1
""")  # noqa: S608 (of constants)

_SCORE = "share_score(t.usage + t.lift, t.usage_at, t.weight, :half_life)"
# A mark of lending lasts this long. A worker that did not learn that its mark was stored marks a slot again.
_MARK_LASTS = "interval '2 minutes'"
# The slots among `held` whose quantum is over and which have done a step of late. Skipped steps have no numbers, but a
# job ends before `MAX_SKIPPED_STEPS` of them come in a row, so a window of that many steps contains one with numbers.
# The primary key (job_id, step) of `metrics` bounds the search to this window.
_LENDABLE = f"""
select a.lease_token, a.stepping_at, j.priority, j.tenant_id, {_SCORE} as score, :slot_seconds / t.weight as slot_score
from jobs j join attempts a on a.lease_token = j.lease_token join tenants t on t.id = j.tenant_id
where j.lease_token = any(cast(:held as bigint[])) and j.status = 'running' and j.pause_requested_at is null
  and (a.lending_at is null or a.lending_at < now() - {_MARK_LASTS})
  and a.stepping_at <= now() - make_interval(secs => :quantum)
  and exists (
      select from metrics m where m.job_id = j.id and m.lease_token = j.lease_token
        and m.step between j.trained_steps - {MAX_SKIPPED_STEPS} + 1 and j.trained_steps)
"""  # noqa: S608 (of constants)
# `waiting` counts, for each tenant with startable jobs, the slots that it could use now. `lending` counts the slots
# that this pool is already giving up. A slot of the tenant with the highest score is lent if the tenants with scores
# lower by the margin want more slots than are on their way.
_LEND_TO_WAITING = text(f"""
with lendable as ({_LENDABLE}), waiting as (
    select q.tenant_id, {_SCORE} as score, least(
        ready.num_jobs,
        t.max_running - (select count(*) from jobs r where r.tenant_id = t.id and r.status = 'running')) as num_slots
    from queues q join tenants t on t.id = q.tenant_id cross join (select cast(:pool as text) as name) p
    cross join lateral (
        select count(*) as num_jobs from (
            select from jobs j
            where j.pool = q.pool and j.tenant_id = q.tenant_id and j.status = 'queued'
              and j.run_after <= now() and (j.suspect_step is null or {_HAS_PATIENCE}) and {IS_IN_REACH} and (
                j.run_after <= now() - make_interval(secs => :left)
                or not exists (select from workers w where {_IS_ABOUT_TO_SERVE}))
            limit {_MAX_READY_JOBS}) j) ready
    where q.pool = p.name and q.num_queued > 0 and exists (select from lendable) and {MAY_START}
      and ready.num_jobs > 0
    order by q.rank limit {_MAX_WAITING_TENANTS}
), lending as (
    select count(*) as num from jobs j join attempts a on a.lease_token = j.lease_token
    where j.pool = :pool and j.status = 'running' and a.lending_at >= now() - {_MARK_LASTS}
)
select v.lease_token, null as borrower from lendable v, lending
where (select sum(w.num_slots) from waiting w
    where w.tenant_id <> v.tenant_id and w.score + :margin * v.slot_score < v.score) > lending.num
order by v.score desc, v.priority, v.stepping_at
limit 1
""")  # noqa: S608 (of constants)
# As above, for jobs that this worker already holds and has no memory for. Here the borrower is known.
_LEND_TO_HELD = text(f"""
with lendable as ({_LENDABLE}), wanting as (
    select j.lease_token, j.tenant_id, {_SCORE} as score from jobs j join tenants t on t.id = j.tenant_id
    where j.lease_token = any(cast(:wanting as bigint[])) and j.status = 'running'
)
select v.lease_token, w.lease_token as borrower from lendable v, wanting w
where w.tenant_id <> v.tenant_id and w.score + :margin * v.slot_score < v.score
order by w.score, v.score desc, v.priority, v.stepping_at
limit 1
""")  # noqa: S608 (of constants)


@dataclass(frozen=True)
class FairestJob:
    """The job that is next over several pools. `is_behind` says that all tenants that hold slots have used less."""

    pool: str
    tenant_id: uuid.UUID
    job_id: uuid.UUID
    is_behind: bool


@dataclass(frozen=True)
class PoolChoice:
    """What a worker chooses from: its pools, the pool it holds, and whether it keeps this one as long as it has work.

    `holders` are the tenants whose jobs the worker holds.
    """

    worker_name: str
    pools: tuple[str, ...]
    pool: str | None
    keeps_pool: bool
    turn_seconds: float = TURN_SECONDS
    holders: tuple[uuid.UUID, ...] = ()


@dataclass(frozen=True)
class Loan:
    """A slot to lend, by its lease token. `borrower` is a held job, or None for a tenant that waits in the pool."""

    lease_token: int
    borrower: int | None


@dataclass(frozen=True)
class SlotTerms:
    """How long a job may keep its slot, and how many GPU-seconds one slot of the worker uses in that time."""

    quantum_seconds: float
    slot_seconds: float


def find_fairest_job(session: ServiceSession, choice: PoolChoice) -> FairestJob | None:
    """Return the next job over a worker's pools, or None if none of them has work for it."""
    values = {
        "pools": list(choice.pools),
        "pool": choice.pool,
        "keeps_pool": choice.keeps_pool,
        "worker": choice.worker_name,
        "left": _LEFT_SECONDS,
        "holders": list(choice.holders),
        "counts_idle": bool(choice.holders),  # a busy worker leaves the job to an idle one
        "turn": choice.turn_seconds,
        "half_life": USAGE_HALF_LIFE_SECONDS,
    }
    found = session.execute(_FAIREST, values).one_or_none()
    return None if found is None else FairestJob(found.pool, found.tenant_id, found.job_id, found.is_behind)


def choose_pool(session: ServiceSession, choice: PoolChoice) -> str | None:
    """Return the pool that a worker serves next. If it will load another base, tell the other workers.

    None if no pool has work for it. A worker that holds jobs keeps its pool while all of their tenants have used less
    than the tenant that is next.
    """
    lock(session, "turns")  # two workers that choose at once would both switch for one job
    fairest = find_fairest_job(session, choice)
    if fairest is None:
        return choice.pool if choice.holders else None
    if fairest.pool == choice.pool or fairest.is_behind:
        return choice.pool
    session.execute(update(Worker).where(Worker.name == choice.worker_name).values(next_pool=fairest.pool))
    return fairest.pool


def record_load(session: ServiceSession, pool: str, *, seconds: float) -> None:
    """Record how long the load of a pool's base took."""
    statement = insert(Pool).values(name=pool, load_seconds=seconds)
    session.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"load_seconds": seconds}))


def lend_slot(
    session: ServiceSession,
    pool: str,
    *,
    worker_name: str,
    held: Sequence[int],
    terms: SlotTerms,
    wanting: Sequence[int] = (),
) -> Loan | None:
    """Choose a slot among `held` (lease tokens) to lend, and mark it as being lent.

    It is lent to one of the jobs `wanting`, which this worker holds without memory for them, or else to a tenant with a
    waiting job in the pool. The borrower always has a lower score. Returns None if there is no borrower, or if no slot
    has had its quantum.
    """
    lock(session, f"lend:{pool}")  # so that each slot that is being lent is counted once
    values = {
        "pool": pool,
        "held": list(held),
        "worker": worker_name,
        "quantum": terms.quantum_seconds,
        "slot_seconds": terms.slot_seconds,
        "half_life": USAGE_HALF_LIFE_SECONDS,
        "margin": _MARGIN,
        "left": _LEFT_SECONDS,
        "counts_idle": True,
        "wanting": list(wanting),
    }
    found = session.execute(_LEND_TO_HELD, values).one_or_none() if wanting else None
    found = found or session.execute(_LEND_TO_WAITING, values).one_or_none()
    if found is None:
        return None
    mark_lending(session, [found.lease_token])
    return Loan(found.lease_token, found.borrower)


def mark_lending(session: ServiceSession, lease_tokens: Sequence[int]) -> None:
    """Mark these attempts as lending their slots, so that they end as lent."""
    session.execute(update(Attempt).where(Attempt.lease_token.in_(lease_tokens)).values(lending_at=func.now()))


def is_lending(session: ServiceSession, lease_token: int) -> bool:
    return session.scalar(select(Attempt.lending_at).where(Attempt.lease_token == lease_token)) is not None
