"""What a tenant may learn of the queue that it shares: sums, through one function with its own role."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# The function runs as this role. The role sees the counted columns of every tenant and nothing else, and cannot log in.
ROLE = "espalier_outlook"
GRANTS = f"""
grant usage on schema public to {ROLE};
grant select (id, weight, usage, usage_at, max_running, disabled_at) on tenants to {ROLE};
grant select (id, tenant_id, pool, status, priority, run_after, total_steps) on jobs to {ROLE};
grant select (job_id, outcome, started_at, ended_at) on attempts to {ROLE};
"""
# A tenant's i-th waiting job (0 is the first) is claimed at the score usage / weight + i * charge / weight. Jobs of
# another tenant come before this one as long as their scores are smaller. A tenant at its quota waits for its own jobs.
FUNCTION = """
create function pool_outlook(wanted_pool text, job uuid, half_life float8, charge float8)
returns table (num_waiting bigint, num_ahead bigint, share_now float8, share_entitled float8, num_measured bigint,
    job_seconds float8[], step_seconds float8[])
language sql stable security definer set search_path = pg_catalog, public as $$
    with own as (
        select j.tenant_id, (
            select count(*) from jobs a
            where a.pool = j.pool and a.tenant_id = j.tenant_id and a.status = 'queued' and a.run_after <= now()
              and (-a.priority, a.id) < (-j.priority, j.id)) as place
        from jobs j
        where j.id = job and j.pool = wanted_pool
          and j.tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid
    ), counted as (
        select j.tenant_id, count(*) filter (where j.status = 'queued' and j.run_after <= now()) as waiting,
            count(*) filter (where j.status = 'running') as running
        from jobs j where j.pool = wanted_pool and j.status in ('queued', 'running') group by j.tenant_id
    ), active as (
        select c.tenant_id, t.weight, t.usage * power(0.5, extract(epoch from now() - t.usage_at) / half_life) as used,
            case when t.disabled_at is null and c.running < t.max_running then c.waiting else 0 end as waiting
        from counted c join tenants t on t.id = c.tenant_id
    ), mine as (
        select o.place, a.tenant_id, a.weight, a.used, (a.used + o.place * charge) / a.weight as score
        from own o join active a using (tenant_id)
    ), recent as (
        select extract(epoch from e.ended_at - e.started_at)::float8 as seconds, j.total_steps as steps
        from attempts e join jobs j on j.id = e.job_id
        where j.pool = wanted_pool and e.outcome = 'succeeded' and e.ended_at > now() - interval '7 days'
        order by e.ended_at desc limit 200
    )
    select (select coalesce(sum(waiting), 0)::bigint from counted),
        m.place + coalesce((
            select sum(least(a.waiting, greatest(0, ceil((m.score - a.used / a.weight) * a.weight / charge))))::bigint
            from active a where a.tenant_id <> m.tenant_id), 0),
        coalesce(m.used / nullif((select sum(used) from active), 0), 0),
        m.weight / (select sum(weight) from active),
        (select count(*) from recent),
        (select percentile_cont(array[0.1, 0.9]) within group (order by seconds) from recent),
        (select percentile_cont(array[0.1, 0.9]) within group (order by seconds / greatest(steps, 1)) from recent)
    from mine m
$$;
"""


def upgrade() -> None:
    # Roles belong to the whole cluster, so another database's migration may have made it already.
    op.execute(f"do $$ begin create role {ROLE} nologin; exception when duplicate_object then null; end $$")
    op.execute(f"grant {ROLE} to current_user")  # needed to give it the function, if the owner is no superuser
    op.execute(GRANTS)
    for table in ("tenants", "jobs", "attempts"):
        op.execute(f"create policy outlook_rows on {table} for select to {ROLE} using (true)")
    op.create_index(
        "ix_attempts_succeeded", "attempts", ["ended_at"], postgresql_where=sa.text("outcome = 'succeeded'")
    )
    op.execute(FUNCTION)
    signature = "pool_outlook(text, uuid, float8, float8)"
    op.execute(f"revoke all on function {signature} from public")
    op.execute(f"grant execute on function {signature} to espalier_api")
    op.execute(f"grant create on schema public to {ROLE}")
    op.execute(f"alter function {signature} owner to {ROLE}")
    op.execute(f"revoke create on schema public from {ROLE}")


def downgrade() -> None:
    op.execute("drop function pool_outlook(text, uuid, float8, float8)")
    op.drop_index("ix_attempts_succeeded", table_name="attempts")
    for table in ("tenants", "jobs", "attempts"):
        op.execute(f"drop policy outlook_rows on {table}")
    op.execute(f"revoke all on tenants, jobs, attempts from {ROLE}")
    op.execute(f"revoke usage on schema public from {ROLE}")
