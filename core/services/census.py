"""Counts of waiting jobs, workers and rows set aside, over all tenants, in one statement, for the schedule's metrics.

Waiting jobs are read through partial indexes, so the many jobs that have ended cost nothing. The number of paused jobs
comes from `queues`, where triggers keep it. No count names a tenant.

`claimable` counts the queued jobs that their tenants may start now: of each tenant, at most as many as it has free
places to run. A job that waits for its tenant's quota is not counted, because only its tenant can change that. A job on
an unusable base is counted, because the operator must repair the base. `workers_wanted` leaves such jobs out, as the
view `pool_demand` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import text

from core.db.session import ServiceSession
from core.domain.duties import Duty
from core.services.turns import IS_IN_REACH, IS_USABLE, MAY_START

# Each common table expression reads one small set once: queued jobs (partial index), running jobs (partial index), the
# workers alive, and the non-empty queues. The branches of the union then join these to the list of pools, so that a
# pool without jobs shows 0 instead of being absent.
_CENSUS = text(f"""
with waiting as (
    select pool, case when run_after > now() then 'delayed' else 'queued' end as state,
        count(*) as num, extract(epoch from now() - min(run_after))::float8 as seconds
    from jobs where status = 'queued' group by 1, 2
), running as (
    select pool, count(*) as num, extract(epoch from now() - min(started_at))::float8 as seconds
    from jobs where status = 'running' group by 1
), alive as (
    select * from workers where alive_until > now()
), pools as (
    select distinct pool as name from queues union select unnest(pools) from alive
), claimable as (
    select q.pool, sum(ready.num) as num, extract(epoch from now() - min(ready.since))::float8 as seconds
    from queues q join tenants t on t.id = q.tenant_id cross join lateral (
        select count(*) as num, min(may_start.run_after) as since from (
            select j.run_after from jobs j
            where j.pool = q.pool and j.tenant_id = q.tenant_id and j.status = 'queued' and j.run_after <= now()
              and {IS_IN_REACH}
            order by j.id limit greatest(t.max_running - (
                select count(*) from jobs r where r.tenant_id = t.id and r.status = 'running'), 0)
        ) may_start
    ) ready
    where q.num_queued > 0 and {MAY_START} group by q.pool
)
select 'jobs' as subject, p.name as pool, s.state, coalesce(w.num, 0) as num, coalesce(greatest(w.seconds, 0), 0)
from pools p cross join (values ('queued'), ('delayed')) s (state)
left join waiting w on w.pool = p.name and w.state = s.state
union all
select 'jobs', p.name, 'running', coalesce(r.num, 0), coalesce(greatest(r.seconds, 0), 0)
from pools p left join running r on r.pool = p.name
union all
select 'jobs', p.name, 'paused', coalesce((select sum(q.num_paused) from queues q where q.pool = p.name), 0), 0
from pools p
union all
select 'claimable', p.name, '', coalesce(c.num, 0)::bigint, coalesce(greatest(c.seconds, 0), 0)
from pools p left join claimable c on c.pool = p.name
union all
select 'workers_wanted', p.name, '', ceil(
    (case when {IS_USABLE} then coalesce(c.num, 0) else 0 end + coalesce(r.num, 0))::numeric / b.slots)::bigint, 0
from pools p join base_models b on b.id = split_part(p.name, '@', 1)
left join claimable c on c.pool = p.name left join running r on r.pool = p.name
union all
select 'pool_workers', p.name, '', (
    select count(*) from alive a where p.name = any (a.pools) and not a.is_clock_wrong
        and not jsonb_exists(a.refusals, p.name)), 0
from pools p
union all
select 'workers', '', s.state, (
    select count(*) from alive a where s.state = case when a.is_clock_wrong then 'clock_wrong' else a.state end), 0
from (values ('idle'), ('loading'), ('serving'), ('stopping'), ('clock_wrong')) s (state)
union all
select 'set_asides', '', d.name, (select count(*) from set_asides s where s.duty = d.name), 0
from unnest(cast(:duties as text[])) d (name)
""")  # noqa: S608 (of constants)


@dataclass(frozen=True)
class Count:
    """The count of one subject, such as jobs by pool and state, or workers that may serve a pool.

    `oldest_seconds` is how long the oldest of these jobs has waited or run.
    """

    subject: Literal["jobs", "claimable", "workers_wanted", "pool_workers", "workers", "set_asides"]
    pool: str
    state: str
    num: int
    oldest_seconds: float


def take_census(session: ServiceSession) -> Sequence[Count]:
    return [Count(*row) for row in session.execute(_CENSUS, {"duties": list(Duty)})]
