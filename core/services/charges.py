"""What tenants are charged in fair share, and the bookings of what they used.

| while | the charge is |
|---|---|
| an attempt begins | its entry charge, an estimate of the work to come |
| it runs | the entry charge or what it has used, whichever is more |
| it has ended | what it used: the rest of an entry charge is returned |

The tenant's row stores the decayed sum of its charges. Its account in fair share is this sum plus a lift. The lift
places a tenant that arrives with new work beside the tenants that are training.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

import structlog
from sqlalchemy import ColumnElement, func, select, text, update
from sqlalchemy.dialects.postgresql import insert

from core.db.models import Attempt, Job, Pool, Tenant, Usage
from core.db.session import ServiceSession
from core.domain.ids import new_id
from core.domain.scheduling import ENTRY_CHARGE_SECONDS, SLOT_SECONDS, USAGE_HALF_LIFE_SECONDS
from core.services.set_asides import ROW_ERRORS

log = structlog.get_logger()
# A tenant without an attempt for this long counts as away. `_MAX_ENDED` bounds the ended attempts that the level reads.
_AWAY_SECONDS = 3600.0
_MAX_ENDED = 200
# The weight of the newest attempt in the pool's moving average.
_NEWEST_PART = 0.2
# Stores each attempt's new use, and returns by how much each tenant's charge grows. The rows are locked in the order of
# their ids, so that two workers that charge the same tenants cannot deadlock. `having` leaves out the tenants whose use
# is still below the entry charges.
_NOTE_USE = text("""
with grown as (
    select a.id, a.tenant_id, a.entry_charge_seconds as entry, a.used_seconds as used, told.seconds
    from attempts a join unnest(cast(:tokens as bigint[]), cast(:seconds as float8[])) as told (token, seconds)
        on told.token = a.lease_token
    where a.outcome is null and told.seconds > a.used_seconds
    order by a.id for no key update of a
), noted as (
    update attempts a set used_seconds = g.seconds from grown g where a.id = g.id
)
select tenant_id, sum(greatest(entry, seconds) - greatest(entry, used)) as seconds
from grown group by tenant_id having sum(greatest(entry, seconds) - greatest(entry, used)) > 0 order by tenant_id
""")

_NEWCOMERS = text("select distinct tenant_id from queues where is_new order by tenant_id limit 1000")
# The tenant's row is locked before its queues, as in claims and charges. The same order everywhere prevents deadlocks.
_TAKE = text("""
with own as (select id from tenants where id = :tenant for no key update skip locked)
update queues q set is_new = false from own where q.tenant_id = own.id and q.is_new returning q.pool
""")
_SCORE = "share_score(t.usage + t.lift, t.usage_at, t.weight, :half_life)"
# The level is the median score over the attempts of other tenants that run or ended within the hour. A tenant that
# already has waiting jobs in another pool keeps its account, because it did not come anew. A tenant that was away for
# the hour does not start behind the level.
_LEVEL = text(f"""
with others as (
    select tenant_id from attempts where outcome is null and tenant_id <> :tenant
    union all (
        select tenant_id from attempts where ended_at > now() - make_interval(secs => :away) and tenant_id <> :tenant
        order by ended_at desc limit {_MAX_ENDED})
), level as (
    select percentile_disc(0.5) within group (order by {_SCORE}) as score
    from others o join tenants t on t.id = o.tenant_id
), own as (
    select t.id, t.weight, {_SCORE} as score, decayed_usage(t.usage, t.usage_at, :half_life) as usage,
        not exists (
            select from attempts a where a.tenant_id = t.id
              and (a.outcome is null or a.ended_at > now() - make_interval(secs => :away))
        ) as was_away,
        exists (
            select from queues q
            where q.tenant_id = t.id and q.num_queued > 0 and q.pool <> all(cast(:pools as text[]))) as waits
    from tenants t where t.id = :tenant
), wanted as (
    select o.id, o.usage, o.weight * greatest(
        case when o.was_away then least(o.score, l.score) else o.score end, l.score - :credit / o.weight) as account
    from own o, level l where l.score is not null and not o.waits
)
update tenants t set usage = w.usage, usage_at = now(), lift = least(greatest(w.account - w.usage, -1e12), 1e12)
from wanted w where t.id = w.id
""")  # noqa: S608 (of constants)


def estimate_charge(job_id: uuid.UUID, *, pool: str, num_steps: int, max_seconds: float) -> ColumnElement[float]:
    """Return the entry charge of a job with `num_steps` to go, from its own steps so far, or from the pool's mean."""
    used = select(func.sum(Attempt.used_seconds)).where(Attempt.job_id == job_id).scalar_subquery()
    trained = select(func.nullif(Job.trained_steps, 0)).where(Job.id == job_id).scalar_subquery()
    of_pool = select(Pool.step_seconds).where(Pool.name == pool).scalar_subquery()
    of_job = func.nullif(used, 0.0) / trained
    return func.least(max_seconds, func.coalesce(num_steps * func.coalesce(of_job, of_pool), ENTRY_CHARGE_SECONDS))


def charge_use(session: ServiceSession, used_seconds: Mapping[int, float]) -> None:
    """Store the GPU-seconds that running attempts have used, by lease token, and charge the increase."""
    tokens, seconds = list(used_seconds), list(used_seconds.values())
    for due in session.execute(_NOTE_USE, {"tokens": tokens, "seconds": seconds}).all():
        try:
            with session.begin_nested():
                charge_tenant(session, due.tenant_id, due.seconds)
        except ROW_ERRORS as error:  # one tenant's broken row must not stop the charges of the others
            log.error("use.uncharged", tenant_id=str(due.tenant_id), error=type(error).__name__)  # noqa: TRY400


def record_usage(session: ServiceSession, lease_token: int, *, gpu_seconds: float, trained_tokens: int) -> None:
    """Book an attempt's use once, and correct its tenant's charge. Allowed after the attempt has ended."""
    attempt = session.scalars(select(Attempt).where(Attempt.lease_token == lease_token).with_for_update()).one()
    if session.scalar(select(Usage.id).where(Usage.attempt_id == attempt.id)):
        return
    session.add(
        Usage(
            id=new_id(),
            tenant_id=attempt.tenant_id,
            attempt_id=attempt.id,
            gpu_seconds=gpu_seconds,
            trained_tokens=trained_tokens,
        )
    )
    charged = max(attempt.entry_charge_seconds, attempt.used_seconds)
    attempt.used_seconds = gpu_seconds
    session.flush()
    charge_tenant(session, attempt.tenant_id, gpu_seconds - charged)
    if gpu_seconds:
        _measure_pool(session, attempt.job_id)


def charge_tenant(session: ServiceSession, tenant_id: uuid.UUID, gpu_seconds: float) -> None:
    when = (Tenant.usage_at, USAGE_HALF_LIFE_SECONDS)
    lift = Tenant.lift_seconds
    values = {
        "usage_seconds": func.greatest(0, func.decayed_usage(Tenant.usage_seconds, *when) + gpu_seconds),
        "lift_seconds": func.decayed_usage(lift, *when) - func.decayed_usage(-lift, *when),  # it may be below 0
        "usage_at": func.now(),
    }
    session.execute(update(Tenant).where(Tenant.id == tenant_id).values(values))


def list_newcomers(session: ServiceSession) -> Sequence[uuid.UUID]:
    """Return tenants that arrived with work and are not levelled yet."""
    return session.scalars(_NEWCOMERS).all()


def level_newcomer(session: ServiceSession, tenant_id: uuid.UUID) -> None:
    """Level the account of a tenant that arrived with work, unless its row is locked; then it is tried again.

    As in start-time fair queuing (Goyal, Vin and Cheng 1996), a tenant gets no credit for the time without requests: it
    starts a slot's quantum before the level. A tenant that was away starts no later than the level, however much it
    once used an idle device.
    """
    pools = session.scalars(_TAKE, {"tenant": tenant_id}).all()
    if not pools:
        return
    values = {"tenant": tenant_id, "pools": list(pools), "away": _AWAY_SECONDS, "credit": SLOT_SECONDS}
    session.execute(_LEVEL, values | {"half_life": USAGE_HALF_LIFE_SECONDS})


def _measure_pool(session: ServiceSession, job_id: uuid.UUID) -> None:
    """Update the pool's mean with the cost of a step of this job."""
    used = select(func.sum(Attempt.used_seconds)).where(Attempt.job_id == job_id).scalar_subquery()
    measured = session.execute(
        select(Job.pool, used / Job.trained_steps).where(Job.id == job_id, Job.trained_steps > 0)
    ).one_or_none()
    if measured is None:
        return
    pool, step_seconds = measured[0], float(measured[1])
    mean = func.coalesce(Pool.step_seconds * (1 - _NEWEST_PART) + step_seconds * _NEWEST_PART, step_seconds)
    statement = insert(Pool).values(name=pool, step_seconds=step_seconds)
    session.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"step_seconds": mean}))
