"""What operators see of jobs, usage and pools: views without the tenant's own columns. Also a role that only scales.

The views belong to `espalier_outlook`, which cannot log in. It may read the columns that the views use; a role that may
read a view reads only the view and no table. No view shows a file's name, a suffix, metadata, a training term or a row.

An owner that is no superuser gets the right to become an operator here: since PostgreSQL 16 the role that makes a role
is its member, but may not become it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

ROLE = "espalier_outlook"
SCALER = "espalier_scaler"
READERS = "espalier_api, espalier_worker, espalier_schedule, espalier_operator"
JOBS = (
    "base_model_id, quantization, attempt_count, max_attempts, trained_tokens, error, pause_requested_at, created_at, "
    "started_at, finished_at"
)
USAGE = "tenant_id, attempt_id, gpu_seconds, trained_tokens, created_at"
POLICIES = ("base_models", "queues", "set_asides", "storage_totals", "usage")
GRANTS = f"""
grant select ({JOBS}) on jobs to {ROLE};
grant select (id, tenant_id, worker_name, used_seconds) on attempts to {ROLE};
grant select (max_gpu_seconds_per_month, max_storage_bytes) on tenants to {ROLE};
grant select (id, quantizations, slots, state) on base_models to {ROLE};
grant select (tenant_id, pool, num_queued) on queues to {ROLE};
grant select (duty, row_id, retry_at) on set_asides to {ROLE};
grant select on storage_totals to {ROLE};
grant select ({USAGE}) on usage to {ROLE};
grant select on alembic_version to {READERS};
grant select on leaders to espalier_operator;
"""
REVOKES = f"""
revoke select on leaders from espalier_operator;
revoke select on alembic_version from {READERS};
revoke select ({USAGE}) on usage from {ROLE};
revoke select on storage_totals from {ROLE};
revoke select (duty, row_id, retry_at) on set_asides from {ROLE};
revoke select (tenant_id, pool, num_queued) on queues from {ROLE};
revoke select (id, quantizations, slots, state) on base_models from {ROLE};
revoke select (max_gpu_seconds_per_month, max_storage_bytes) on tenants from {ROLE};
revoke select (id, tenant_id, worker_name, used_seconds) on attempts from {ROLE};
revoke select ({JOBS}) on jobs from {ROLE};
"""
ROLES = f"""
do $$ begin
    create role {SCALER} nologin;
exception when duplicate_object then null;
end $$;
grant usage on schema public to {SCALER};
do $$ begin
    if current_setting('server_version_num')::int >= 160000 then
        if not pg_has_role(current_user, 'espalier_operator', 'SET') then
            execute format('grant espalier_operator to %I with set true', current_user);
        end if;
    end if;
end $$;
"""
# At most as many jobs of a tenant are counted as it may still start, so a long queue costs no more than a short one.
COUNT_DEMAND = """
create function count_pool_demand(wanted_pool text) returns table (num_claimable bigint, num_running bigint)
language sql stable security definer rows 1 set search_path = pg_catalog, public as $$
    select case when exists (
            select from base_models b where b.id = split_part(wanted_pool, '@', 1) and b.state = 'unusable')
        then 0 else coalesce((
            select sum(ready.num_jobs) from queues q join tenants t on t.id = q.tenant_id
            cross join lateral (
                select count(*) as num_jobs from (
                    select from jobs j
                    where j.pool = q.pool and j.tenant_id = q.tenant_id and j.status = 'queued' and j.run_after <= now()
                      and not exists (
                        select from set_asides s where s.duty = 'claim' and s.row_id = j.id and s.retry_at > now())
                    limit greatest(t.max_running - (
                        select count(*) from jobs r where r.tenant_id = t.id and r.status = 'running'), 0)
                ) may_start
            ) ready
            where q.pool = wanted_pool and q.num_queued > 0 and t.disabled_at is null
              and within_gpu_quota(t.id, t.max_gpu_seconds_per_month)
              and within_storage_quota(t.id, t.max_storage_bytes)
        ), 0)::bigint end,
        (select count(*) from jobs j where j.pool = wanted_pool and j.status = 'running')
$$
"""
SIGNATURE = "count_pool_demand(text)"
# A pool is shown as long as its base is known, even if disabled, and so is every pool that ever had a job.
VIEWS = {
    "pool_demand": """
create view pool_demand as
select p.pool, d.num_claimable, d.num_running, p.num_slots,
    ceil((d.num_claimable + d.num_running)::numeric / p.num_slots)::bigint as workers_wanted
from (
    select b.id || '@' || q.name as pool, b.slots as num_slots
    from base_models b cross join lateral unnest(array['none'] || b.quantizations) q (name)
    union
    select q.pool, b.slots from queues q join base_models b on b.id = split_part(q.pool, '@', 1)
) p cross join lateral count_pool_demand(p.pool) d
""",
    "operator_jobs": """
create view operator_jobs as
select j.id, j.tenant_id, j.base_model_id, j.quantization, j.pool, j.status, j.priority, j.run_after, j.total_steps,
    j.trained_steps, j.trained_tokens, j.attempt_count, j.max_attempts, j.pause_requested_at, j.error ->> 'code' as error_code,
    j.created_at, j.started_at, j.finished_at, a.worker_name, a.used_seconds
from jobs j left join attempts a on a.lease_token = j.lease_token
""",
    "operator_usage": """
create view operator_usage as
select u.tenant_id, a.job_id, j.pool, u.gpu_seconds, u.trained_tokens, u.created_at
from usage u join attempts a on a.id = u.attempt_id join jobs j on j.id = a.job_id
""",
}


def upgrade() -> None:
    op.add_column("workers", sa.Column("version", sa.Text()))
    # Running jobs are few, have their own indexes, and are updated at every heartbeat, so these indexes leave them out.
    for name, columns in (
        ("ix_jobs_pool_status_id", ["pool", "status", "id"]),
        ("ix_jobs_tenant_id_pool_status_id", ["tenant_id", "pool", "status", "id"]),
    ):
        op.create_index(name, "jobs", columns, postgresql_where=sa.text("status <> 'running'"))
    op.create_index("ix_usage_created_at", "usage", ["created_at"])
    op.execute(ROLES)
    op.execute(GRANTS)
    for table in POLICIES:
        op.execute(f"create policy outlook_rows on {table} for select to {ROLE} using (true)")
    op.execute(COUNT_DEMAND)
    op.execute(f"revoke all on function {SIGNATURE} from public")
    op.execute(f"grant execute on function {SIGNATURE} to {SCALER}, espalier_operator")
    for view in VIEWS.values():
        op.execute(view)
    op.execute(f"grant select on pool_demand to {SCALER}")
    op.execute(f"grant select on {', '.join(VIEWS)} to espalier_operator")
    op.execute(f"grant create on schema public to {ROLE}")
    op.execute(f"alter function {SIGNATURE} owner to {ROLE}")
    for name in VIEWS:
        op.execute(f"alter view {name} owner to {ROLE}")
    op.execute(f"revoke create on schema public from {ROLE}")


def downgrade() -> None:
    for name in reversed(VIEWS):
        op.execute(f"drop view {name}")
    op.execute(f"drop function {SIGNATURE}")
    for table in POLICIES:
        op.execute(f"drop policy outlook_rows on {table}")
    op.execute(REVOKES)
    # The role stays: it belongs to the whole cluster, and another database may use it.
    op.execute(f"revoke usage on schema public from {SCALER}")
    op.drop_index("ix_usage_created_at", table_name="usage")
    for name in ("ix_jobs_tenant_id_pool_status_id", "ix_jobs_pool_status_id"):
        op.drop_index(name, table_name="jobs", postgresql_where=sa.text("status <> 'running'"))
    op.drop_column("workers", "version")
