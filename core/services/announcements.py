"""Events for waiting jobs: a worker is loading their base, and whether the load succeeded.

No worker holds a lease on these jobs. So each row is locked before its event is written, and a row that another
transaction has locked is skipped.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import text

from core.db.models import Pool
from core.db.session import ServiceSession
from core.services.events import EVENT_CHANNEL
from core.services.turns import IS_IN_REACH, MAY_START

# Picks up to `num_jobs` jobs, in about the order in which they will be claimed. The lateral query numbers each tenant's
# first jobs, and the outer order takes every tenant's first job before any tenant's second.
_FIRST = f"""
    select c.id from (select cast(:pool as text) as name) p join queues q on q.pool = p.name
    join tenants t on t.id = q.tenant_id
    cross join lateral (
        select f.id, row_number() over () as place from (
            select j.id from jobs j
            where j.pool = q.pool and j.tenant_id = q.tenant_id and j.status = 'queued' and j.run_after <= now()
              and {IS_IN_REACH}
            order by j.priority desc, j.id limit :num_jobs) f) c
    where q.num_queued > 0 and {MAY_START}
    order by c.place, q.rank, q.tenant_id limit :num_jobs
"""  # noqa: S608 (of constants)
# `skip locked` keeps this statement from waiting for a claim. A job that is being claimed needs no announcement.
_TELL = """
with waiting as (
    select j.id, j.tenant_id from jobs j where j.id in ({ids}) and j.status = 'queued'
    for no key update skip locked
), told as (
    insert into events (id, tenant_id, job_id, level, type, message)
    select gen_random_uuid(), w.tenant_id, w.id, :level, 'message', :message from waiting w returning job_id
)
select job_id, pg_notify(:channel, job_id::text) from told
"""
_TELL_FIRST = text(_TELL.format(ids=_FIRST))
_TELL_THESE = text(_TELL.format(ids="select unnest(cast(:job_ids as uuid[]))"))


def announce_load(session: ServiceSession, pool: str, *, base_model_id: str, num_jobs: int) -> Sequence[uuid.UUID]:
    """Tell the jobs that a worker will claim first that it is loading their base. Returns their ids."""
    known = session.get(Pool, pool)
    last_time = ""
    if known is not None and known.load_seconds is not None:
        last_time = f"; the last time that took {known.load_seconds:.1f} s"
    message = f"A worker is loading the base model {base_model_id}{last_time}."
    values = {"pool": pool, "num_jobs": num_jobs, "level": "info", "message": message, "channel": EVENT_CHANNEL}
    return session.scalars(_TELL_FIRST, values).all()


def announce_loaded(session: ServiceSession, job_ids: Sequence[uuid.UUID], *, seconds: float) -> None:
    """Tell those of the jobs that still wait how long the load of their base took."""
    _tell(session, job_ids, level="info", message=f"The base model was loaded in {seconds:.1f} s.")


def announce_unloaded(session: ServiceSession, job_ids: Sequence[uuid.UUID], *, base_model_id: str) -> None:
    """Tell those of the jobs that still wait that the load has failed. Only operators see the reason."""
    told = f"The worker could not load the base model {base_model_id}; the job waits for another, and loses no attempt."
    _tell(session, job_ids, level="warn", message=told)


def _tell(session: ServiceSession, job_ids: Sequence[uuid.UUID], *, level: str, message: str) -> None:
    values = {"job_ids": list(job_ids), "level": level, "message": message, "channel": EVENT_CHANNEL}
    session.execute(_TELL_THESE, values)
