"""Whose turn it is: which pool a worker serves next, and which slot is lent to a tenant that waits.

Both follow the order of fair share (core.domain.scheduling). A waiting job that another worker is about to take,
because that one has room for it or loads its base, is left to it for a while: otherwise every worker would move for
one job. A worker moves all the same where more jobs wait than those others have room for.
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

# So long is a job left to a worker that seems to be about to take it.
_LEFT_SECONDS = 60.0
# A slot changes hands only if the scores differ by more than this part of what a slot uses in a quantum: tenants that
# are even do not swap their slots to and fro.
_MARGIN = 0.5
# So many tenants are looked at, the lowest scores first, when slots are counted that others wait for.
_MAX_WAITING_TENANTS = 100
_MAX_READY_JOBS = 64

# A tenant `t` whose jobs may start now.
MAY_START = """
t.disabled_at is null and within_gpu_quota(t.id, t.max_gpu_seconds_per_month)
  and within_storage_quota(t.id, t.max_storage_bytes)
  and (select count(*) from jobs r where r.tenant_id = t.id and r.status = 'running') < t.max_running
"""
# A pool `p`, which is named after its base, whose base can be used as far as is known.
IS_USABLE = """
not exists (select from base_models b where b.id = split_part(p.name, '@', 1) and b.state = 'unusable')
"""
# A job `j` that is not set aside.
IS_IN_REACH = """
not exists (select from set_asides s where s.duty = 'claim' and s.row_id = j.id and s.retry_at > now())
"""
# Another worker `w` that takes jobs of pool `p.name` soon, if any come.
_IS_ABOUT_TO_SERVE = """
w.alive_until > now() and w.state <> 'stopping' and not w.is_clock_wrong and w.name <> :worker
and p.name = any(w.pools)
and not jsonb_exists(w.refusals, p.name) and (
    w.next_pool = p.name or (w.pool = p.name and (w.state = 'loading' or w.slots_in_use < w.slots))
    or (w.state = 'idle' and w.next_pool is null and w.pool is distinct from p.name and :counts_idle))
"""
# A busy worker takes a job `j` that must be tried alone once it has waited for so long.
_HAS_PATIENCE = f"j.run_after <= now() - make_interval(secs => {SUSPECT_PATIENCE_SECONDS})"
# More jobs of pool `p.name` may start than the workers that are about to serve it have room for.
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
# In each pool the fairest tenant's first job. Of those the fairest is served; of one tenant's, the one it put first.
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
# Slots among `held` that have had their quantum, in which at least one step was done. Steps that were skipped have no
# numbers, and are never as many in a row as end a job.
# A worker that has not heard that its mark was stored marks again.
_MARK_LASTS = "interval '2 minutes'"
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
    """The job that is next over several pools. It `is_behind` if all who hold slots have used less."""

    pool: str
    tenant_id: uuid.UUID
    job_id: uuid.UUID
    is_behind: bool


@dataclass(frozen=True)
class PoolChoice:
    """What a worker chooses between: its pools, which of them it holds, and whether it keeps that while it has work.

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
    """A slot that is lent, by its lease token; to the held job `borrower`, or to whoever waits in the pool."""

    lease_token: int
    borrower: int | None


@dataclass(frozen=True)
class SlotTerms:
    """How long a slot is a job's own, and how many GPU-seconds one slot of the worker uses in that time."""

    quantum_seconds: float
    slot_seconds: float


def find_fairest_job(session: ServiceSession, choice: PoolChoice) -> FairestJob | None:
    """Return the next job over a worker's pools, or None where none of them has work for it."""
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
    """Return the pool a worker serves next, and tell the other workers if it is about to load another base.

    None where no pool has work for it. A worker that holds jobs keeps its pool while all their tenants have used less
    than the one that is next.
    """
    lock(session, "turns")  # two workers that choose at once would both move for one job
    fairest = find_fairest_job(session, choice)
    if fairest is None:
        return choice.pool if choice.holders else None
    if fairest.pool == choice.pool or fairest.is_behind:
        return choice.pool
    session.execute(update(Worker).where(Worker.name == choice.worker_name).values(next_pool=fairest.pool))
    return fairest.pool


def record_load(session: ServiceSession, pool: str, *, seconds: float) -> None:
    """Note how long it took to load the base of a pool."""
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
    """Choose a slot among `held` (lease tokens) to lend, and note that it is being lent.

    It goes to one of the jobs `wanting`, which this worker holds and has no memory for, or else to a tenant whose job
    waits in the pool: always to one with a lower score. None where there is none, or no slot has had its quantum.
    """
    lock(session, f"lend:{pool}")  # each slot that is being lent is counted once
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
    """Note that these attempts give their slots to others: they will end as lent."""
    session.execute(update(Attempt).where(Attempt.lease_token.in_(lease_tokens)).values(lending_at=func.now()))


def is_lending(session: ServiceSession, lease_token: int) -> bool:
    return session.scalar(select(Attempt.lending_at).where(Attempt.lease_token == lease_token)) is not None
