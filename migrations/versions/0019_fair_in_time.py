"""Use is charged while a job runs, slots are lent, newcomers are levelled, and the outlook includes running jobs.

A tenant's account is `usage + lift`: what it used, and by how much it was moved when it returned with work. Both decay
alike. The account per weight is the tenant's place in fair share.

The old `pool_outlook` stays for an API of the previous version; a later migration drops it.
"""

import sqlalchemy as sa
from alembic import op

from migrations.forced import unforced

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

ROLE = "espalier_outlook"
OUTCOMES = ("succeeded", "failed", "cancelled", "preempted", "paused", "lost", "lent")
GRANTS = f"""
grant select, insert, update on pools to espalier_worker, espalier_schedule;
grant update (used_seconds) on attempts to espalier_schedule;
grant select on pools to espalier_api;
grant update (lift) on tenants to espalier_worker, espalier_schedule;
grant select (lift) on tenants to {ROLE};
grant update (used_seconds, stepping_at, lending_at) on attempts to espalier_worker;
grant select (trained_steps, lease_token) on jobs to {ROLE};
grant select (lease_token, stepping_at) on attempts to {ROLE};
grant select (job_id, step, lease_token, created_at) on metrics to {ROLE};
"""
WITHIN_QUOTA = """
create or replace function within_gpu_quota(tenant uuid, quota double precision) returns boolean language sql stable as $$
    select quota is null or quota > (
        select coalesce(sum(least(u.gpu_seconds, 1e9)), 0) from usage u
        where u.tenant_id = tenant and u.created_at >= date_trunc('month', now(), 'UTC'))
        {running}
$$
"""
RUNNING = """+ (select coalesce(sum(least(a.used_seconds, 1e9)), 0) from attempts a
            where a.tenant_id = tenant and a.outcome is null)"""
# A tenant's i-th waiting job (0 is the first) is claimed at the score usage / weight + i * charge / weight. Jobs of
# another tenant come before this one as long as their scores are smaller. A tenant at its quota waits for its own jobs.
#
# A slot becomes free when its job ends, or when it is lent: after its quantum, if its tenant's score is above that of
# the tenant that asks. `leaves` has both as seconds from now. The bounds allow for steps a quarter quicker or slower
# than the last 32. The slots become free one after the other, so the slot after those of the jobs ahead is the one that
# counts.
OUTLOOK = """
create function queue_outlook(wanted_pool text, job uuid, half_life float8, charge float8, quantum float8,
    free_slots bigint)
returns table (num_waiting bigint, num_ahead bigint, num_rivals bigint, is_fairest boolean, share_now float8,
    share_entitled float8, num_measured bigint, job_seconds float8[], step_seconds float8[], num_running bigint,
    leave_seconds float8[])
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
        select c.tenant_id, t.weight, decayed_usage(t.usage, t.usage_at, half_life) as used,
            share_score(t.usage + t.lift, t.usage_at, t.weight, half_life) as score,
            case when t.disabled_at is null and (
                select count(*) from jobs r where r.tenant_id = t.id and r.status = 'running') < t.max_running
            then c.waiting else 0 end as waiting
        from counted c join tenants t on t.id = c.tenant_id
    ), mine as (
        select o.place, a.tenant_id, a.weight, a.used, a.score as own_score, a.score + o.place * charge / a.weight as score
        from own o join active a using (tenant_id)
    ), ahead as (
        select m.place + coalesce((
            select sum(least(a.waiting, greatest(0, ceil((m.score - a.score) * a.weight / charge))))::bigint
            from active a where a.tenant_id <> m.tenant_id), 0) as num
        from mine m
    ), recent as (
        select extract(epoch from e.ended_at - e.started_at)::float8 as seconds, j.total_steps as steps
        from attempts e join jobs j on j.id = e.job_id
        where j.pool = wanted_pool and e.outcome = 'succeeded' and e.ended_at > now() - interval '7 days'
        order by e.ended_at desc limit 200
    ), leaves as (
        select (j.total_steps - j.trained_steps) * s.seconds_a_step as ends_in,
            case when a.score > m.score
                then greatest(0, quantum - extract(epoch from now() - coalesce(e.stepping_at, now()))) end as lent_in
        from jobs j cross join mine m join active a on a.tenant_id = j.tenant_id
        join attempts e on e.lease_token = j.lease_token
        left join lateral (
            select extract(epoch from max(x.created_at) - min(x.created_at)) / nullif(count(*) - 1, 0) as seconds_a_step
            from metrics x where x.job_id = j.id and x.lease_token = j.lease_token and x.step > j.trained_steps - 33
        ) s on true
        where j.pool = wanted_pool and j.status = 'running'
    ), quick as (
        select coalesce(least(0.75 * ends_in, lent_in), 0)::float8 as seconds, row_number() over (
            order by coalesce(least(0.75 * ends_in, lent_in), 0)) as number from leaves
    ), slow as (
        select least(1.25 * ends_in, lent_in)::float8 as seconds, row_number() over (
            order by least(1.25 * ends_in, lent_in) nulls last) as number from leaves
    ), wanted as (
        select least(greatest(h.num + 1 - free_slots, 0), (select count(*) from leaves)) as number from ahead h
    )
    select (select coalesce(sum(waiting), 0)::bigint from counted),
        (select num from ahead),
        (select coalesce(sum(waiting), 0)::bigint from counted where tenant_id <> m.tenant_id),
        not exists (select from active a where a.tenant_id <> m.tenant_id and a.score < m.own_score),
        coalesce(m.used / nullif((select sum(used) from active), 0), 0),
        m.weight / (select sum(weight) from active),
        (select count(*) from recent),
        (select percentile_cont(array[0.1, 0.9]) within group (order by seconds) from recent),
        (select percentile_cont(array[0.1, 0.9]) within group (order by seconds / greatest(steps, 1)) from recent),
        (select count(*) from leaves),
        array[
            case when (select number from wanted) = 0 then 0
                else (select seconds from quick where number = (select number from wanted)) end,
            case when (select number from wanted) = 0 then 0
                else (select seconds from slow where number = (select number from wanted)) end]
    from mine m
$$;
"""
# The function and the triggers of 0016, with a half-life of a day, the lift, and a mark on queues that a submission
# finds empty. Between tenants that always have work decay does not help, and a short half-life favours the one that
# trains first.
RANK = """
create or replace function share_rank(usage double precision, usage_at timestamptz, weight double precision)
returns double precision language sql stable as $$
    select case when usage > 0
        then (ln(least(greatest(usage, 1e-6), 1e12)) - ln(least(greatest(weight, 0.01), 1000))) / ln(2)
            + extract(epoch from usage_at) / {half_life}
        else '-infinity'::double precision end
$$;
"""
SCORE = """
create function share_score(usage float8, usage_at timestamptz, weight float8, half_life float8) returns float8
language sql stable as $$
    select decayed_usage(usage, usage_at, half_life) / least(greatest(weight, 0.01), 1000)
$$;
"""
TRIGGERS = """
drop trigger rank_queues on tenants;
create or replace function rank_queues() returns trigger language plpgsql as $$
begin
    update queues set rank = share_rank(new.usage {lift_of_new}, new.usage_at, new.weight) where tenant_id = new.id;
    return null;
end $$;
create trigger rank_queues after update of usage, {lift_column} usage_at, weight on tenants
    for each row execute function rank_queues();
create or replace function count_waiting() returns trigger language plpgsql as $$
declare
    queued int := 0;
    paused int := 0;
    -- By its tenant's doing: submitted, or resumed. What a worker gives back has waited before.
    came boolean := tg_op = 'INSERT';
begin
    if tg_op = 'UPDATE' then
        came := old.status = 'paused';
    end if;
    if tg_op <> 'INSERT' then
        queued := -(old.status = 'queued')::int;
        paused := -is_paused_or_pausing(old.status, old.pause_requested_at)::int;
    end if;
    if tg_op <> 'DELETE' then
        queued := queued + (new.status = 'queued')::int;
        paused := paused + is_paused_or_pausing(new.status, new.pause_requested_at)::int;
    end if;
    update queues set num_queued = num_queued + queued, num_paused = num_paused + paused {is_new_change}
        where tenant_id = coalesce(new.tenant_id, old.tenant_id) and pool = coalesce(new.pool, old.pool);
    if not found then
        insert into queues (tenant_id, pool, num_queued, num_paused, rank {is_new_column})
        select t.id, new.pool, queued, paused, share_rank(t.usage {lift_of_t}, t.usage_at, t.weight) {is_new_value}
        from tenants t where t.id = new.tenant_id
        on conflict (tenant_id, pool) do update
            set num_queued = queues.num_queued + queued, num_paused = queues.num_paused + paused;
    end if;
    return null;
end $$;
"""
WITH_LIFT = {
    "lift_of_new": "+ new.lift",
    "lift_column": "lift,",
    "lift_of_t": "+ t.lift",
    "is_new_column": ", is_new",
    "is_new_value": ", queued > 0 and came",
    "is_new_change": ", is_new = is_new or (queued > 0 and came and num_queued = 0)",
}
RERANK = """
update queues q set rank = share_rank(t.usage {lift}, t.usage_at, t.weight) from tenants t where t.id = q.tenant_id
"""
SIGNATURE = "queue_outlook(text, uuid, float8, float8, float8, bigint)"


def _allow_outcomes(outcomes: tuple[str, ...]) -> None:
    op.drop_constraint(op.f("ck_attempts_outcome_known"), "attempts", type_="check")
    listed = ", ".join(repr(outcome) for outcome in outcomes)
    op.create_check_constraint(op.f("ck_attempts_outcome_known"), "attempts", f"outcome in ({listed})")


def upgrade() -> None:
    op.add_column("attempts", sa.Column("used_seconds", sa.Double(), server_default="0", nullable=False))
    op.add_column("attempts", sa.Column("stepping_at", sa.DateTime(timezone=True)))
    op.add_column("attempts", sa.Column("lending_at", sa.DateTime(timezone=True)))
    op.add_column("workers", sa.Column("pool_since", sa.DateTime(timezone=True)))
    op.add_column("workers", sa.Column("next_pool", sa.Text()))
    op.add_column("tenants", sa.Column("lift", sa.Double(), server_default="0", nullable=False))
    op.add_column("queues", sa.Column("is_new", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_index("ix_queues_new", "queues", ["tenant_id"], postgresql_where=sa.text("is_new"))
    _allow_outcomes(OUTCOMES)
    op.create_index("ix_attempts_open", "attempts", ["tenant_id"], postgresql_where=sa.text("outcome is null"))
    op.create_table(
        "pools",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("step_seconds", sa.Double()),
        sa.Column("load_seconds", sa.Double()),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_pools")),
        sa.CheckConstraint("step_seconds >= 0 and load_seconds >= 0", name=op.f("ck_pools_seconds_not_negative")),
    )
    with unforced():
        _share_in_time()


def _share_in_time() -> None:
    op.execute(GRANTS)
    op.execute("grant update (is_new) on queues to espalier_api")  # the trigger runs with the submitter's rights
    op.create_check_constraint(op.f("ck_tenants_lift_bounded"), "tenants", "lift between -1e12 and 1e12")
    op.execute(SCORE)
    op.execute(RANK.format(half_life=86400))
    op.execute(TRIGGERS.format(**WITH_LIFT))
    op.execute(RERANK.format(lift="+ t.lift"))
    op.execute(WITHIN_QUOTA.format(running=RUNNING))
    op.execute(f"create policy outlook_rows on metrics for select to {ROLE} using (true)")
    op.execute(OUTLOOK)
    op.execute(f"revoke all on function {SIGNATURE} from public")
    op.execute(f"grant execute on function {SIGNATURE} to espalier_api")
    op.execute(f"grant create on schema public to {ROLE}")
    op.execute(f"alter function {SIGNATURE} owner to {ROLE}")
    op.execute(f"revoke create on schema public from {ROLE}")


def downgrade() -> None:
    op.execute(f"drop function {SIGNATURE}")
    op.execute("drop policy outlook_rows on metrics")
    op.execute(f"revoke all on metrics from {ROLE}")
    op.execute(f"revoke select (trained_steps, lease_token) on jobs from {ROLE}")
    op.execute(f"revoke select (lease_token) on attempts from {ROLE}")
    op.execute(WITHIN_QUOTA.format(running=""))
    op.execute(TRIGGERS.format(**dict.fromkeys(WITH_LIFT, "")))
    op.execute(RANK.format(half_life=21600))
    with unforced():
        op.execute(RERANK.format(lift=""))
        op.execute("update attempts set outcome = 'preempted' where outcome = 'lent'")
    op.execute("drop function share_score")
    op.drop_table("pools")
    op.drop_index("ix_attempts_open", table_name="attempts", postgresql_where=sa.text("outcome is null"))
    _allow_outcomes(OUTCOMES[:-1])
    op.drop_index("ix_queues_new", table_name="queues", postgresql_where=sa.text("is_new"))
    op.drop_column("queues", "is_new")
    op.drop_column("tenants", "lift")
    op.drop_column("workers", "next_pool")
    op.drop_column("workers", "pool_since")
    op.drop_column("attempts", "lending_at")
    op.drop_column("attempts", "stepping_at")
    op.drop_column("attempts", "used_seconds")
