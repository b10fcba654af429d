"""Waiting jobs and stored bytes are counted, every number has bounds, and rows at fault are set aside.

`queues.num_paused` counts jobs that are paused or about to pause, and `storage_totals` the bytes of rows whose objects
still exist. Triggers keep both. The job's row reserves its model's name: its last eight digits are unique for a tenant.
Numbers out of bounds are moved to the nearest bound, and the audit log says for which tenants.
"""

import sqlalchemy as sa
from alembic import op

from migrations.forced import unforced

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

CURRENT_TENANT = "nullif(current_setting('app.tenant_id', true), '')::uuid"
OLD_CHECKS = (
    ("tenants", "weight_positive", "weight > 0"),
    ("tenants", "quotas_not_negative", "max_running >= 0 and max_queued >= 0"),
    (
        "tenants",
        "limits_not_negative",
        "max_storage_bytes >= 0 and max_tokens_per_job >= 0 and max_gpu_seconds_per_month >= 0 and requests_per_minute >= 1",
    ),
    ("base_models", "limits_positive", "max_seq_len >= 8 and max_rank >= 1 and slots >= 1"),
    ("uploads", "size_positive", "size_bytes > 0"),
    ("usage", "amounts_not_negative", "gpu_seconds >= 0 and trained_tokens >= 0"),
)
BOUNDS = (
    ("tenants", "weight", "0.01", "1000"),
    ("tenants", "usage", "0", "1000000000000.0"),
    ("tenants", "max_running", "0", "10000"),
    ("tenants", "max_queued", "0", "10000000"),
    ("tenants", "max_storage_bytes", "0", "9007199254740992"),
    ("tenants", "max_tokens_per_job", "0", "9007199254740992"),
    ("tenants", "max_gpu_seconds_per_month", "0", "1000000000.0"),
    ("tenants", "requests_per_minute", "1", "1000000"),
    ("base_models", "max_seq_len", "8", "16777216"),
    ("base_models", "max_rank", "1", "16777216"),
    ("base_models", "slots", "1", "1024"),
    ("base_models", "max_tokens_per_step", "8", "16777216"),
    ("uploads", "size_bytes", "1", "8589934592"),
    ("uploads", "file_lifetime_seconds", "3600", "2592000"),
    ("jobs", "priority", "-100", "100"),
    ("usage", "gpu_seconds", "0", "1000000000.0"),
    ("usage", "trained_tokens", "0", "9007199254740992"),
)
NEW_CHECKS = (
    ("tenants", "usage_at_finite", "isfinite(usage_at)"),
    ("jobs", "name_digits_form", "name_digits ~ '^[0-9a-f]{8}$'"),
    ("jobs", "total_steps_not_negative", "total_steps >= 0"),
    ("adapters", "size_not_negative", "size_bytes >= 0"),
    ("checkpoints", "size_not_negative", "size_bytes >= 0"),
    ("resume_points", "size_not_negative", "size_bytes >= 0"),
    ("queues", "num_paused_not_negative", "num_paused >= 0"),
)
UNPURGED = {
    "files": "deleted_at is not null and purged_at is null",
    "adapters": "deleted_at is not null and purged_at is null",
    "checkpoints": "deleted_at is not null and purged_at is null",
    "uploads": "purged_at is null",
}
OLD_INDEXES = {
    "files": ("ix_files_deleted", "deleted_at"),
    "adapters": ("ix_adapters_deleted", "deleted_at"),
    "checkpoints": ("ix_checkpoints_deleted", "deleted_at"),
    "uploads": ("ix_uploads_unpurged", "expires_at"),
}
# Half of the smallest double underflows, which PostgreSQL reports as an error. This happened to a tenant that had been
# idle for nine months.
DECAY = """
create function decayed_usage(usage float8, usage_at timestamptz, half_life float8) returns float8
language sql stable as $$
    select case when usage > 1e-6
        then least(usage, 1e12) * power(0.5, least(greatest(extract(epoch from now() - usage_at) / half_life, 0), 100))
        else 0 end
$$;
"""
# The arguments of the logarithms are bounded, so no row, whatever it contains, can make the claim fail.
RANK = """
create or replace function share_rank(usage double precision, usage_at timestamptz, weight double precision)
returns double precision language sql stable as $$
    select case when usage > 0
        then (ln(least(greatest(usage, 1e-6), 1e12)) - ln(least(greatest(weight, 0.01), 1000))) / ln(2)
            + extract(epoch from usage_at) / 21600
        else '-infinity'::double precision end
$$;
"""
OLD_RANK = """
create or replace function share_rank(usage double precision, usage_at timestamptz, weight double precision)
returns double precision language sql stable as $$
    select case when usage > 0 then ln(usage / weight) / ln(2) + extract(epoch from usage_at) / 21600
        else '-infinity'::double precision end
$$;
"""
WITHIN_GPU_QUOTA = """
create or replace function within_gpu_quota(tenant uuid, quota double precision) returns boolean language sql stable as $$
    select quota is null or quota > (
        select coalesce(sum({seconds}), 0) from usage u
        where u.tenant_id = tenant and u.created_at >= date_trunc('month', now(), 'UTC'))
$$;
"""
WITHIN_STORAGE_QUOTA = """
create function within_storage_quota(tenant uuid, quota bigint) returns boolean language sql stable as $$
    select quota is null or quota >= coalesce((select s.num_bytes from storage_totals s where s.tenant_id = tenant), 0)
$$;
"""
# The other lines of the function are unchanged.
OUTLOOK = """
do $$ begin
    execute replace(pg_get_functiondef('pool_outlook(text, uuid, float8, float8)'::regprocedure), '{old}', '{new}');
end $$
"""
OLD_DECAY = "t.usage * power(0.5, extract(epoch from now() - t.usage_at) / half_life)"
NEW_DECAY = "decayed_usage(t.usage, t.usage_at, half_life)"
WAITING = """
create function is_paused_or_pausing(status text, pause_requested_at timestamptz) returns boolean
language sql immutable as $$ select status = 'paused' or pause_requested_at is not null $$;

create function count_waiting() returns trigger language plpgsql as $$
declare
    queued int := 0;
    paused int := 0;
begin
    if tg_op <> 'INSERT' then
        queued := -(old.status = 'queued')::int;
        paused := -is_paused_or_pausing(old.status, old.pause_requested_at)::int;
    end if;
    if tg_op <> 'DELETE' then
        queued := queued + (new.status = 'queued')::int;
        paused := paused + is_paused_or_pausing(new.status, new.pause_requested_at)::int;
    end if;
    update queues set num_queued = num_queued + queued, num_paused = num_paused + paused
        where tenant_id = coalesce(new.tenant_id, old.tenant_id) and pool = coalesce(new.pool, old.pool);
    if not found then
        insert into queues (tenant_id, pool, num_queued, num_paused, rank)
        select t.id, new.pool, queued, paused, share_rank(t.usage, t.usage_at, t.weight)
        from tenants t where t.id = new.tenant_id
        on conflict (tenant_id, pool) do update
            set num_queued = queues.num_queued + queued, num_paused = queues.num_paused + paused;
    end if;
    return null;
end $$;
create trigger count_waiting_of_new after insert on jobs
    for each row when (new.status = 'queued' or is_paused_or_pausing(new.status, new.pause_requested_at))
    execute function count_waiting();
create trigger count_waiting after update of status, pause_requested_at on jobs
    for each row when ((old.status = 'queued') <> (new.status = 'queued') or
        is_paused_or_pausing(old.status, old.pause_requested_at)
        <> is_paused_or_pausing(new.status, new.pause_requested_at))
    execute function count_waiting();
create trigger count_waiting_of_old after delete on jobs
    for each row when (old.status = 'queued' or is_paused_or_pausing(old.status, old.pause_requested_at))
    execute function count_waiting();
"""
QUEUED = """
create function count_queued() returns trigger language plpgsql as $$
begin
    if tg_op <> 'INSERT' and old.status = 'queued' then
        update queues set num_queued = num_queued - 1 where tenant_id = old.tenant_id and pool = old.pool;
    end if;
    if tg_op <> 'DELETE' and new.status = 'queued' then
        insert into queues (tenant_id, pool, num_queued, rank)
        select t.id, new.pool, 1, share_rank(t.usage, t.usage_at, t.weight) from tenants t where t.id = new.tenant_id
        on conflict (tenant_id, pool) do update set num_queued = queues.num_queued + 1;
    end if;
    return null;
end $$;
create trigger count_queued_of_new after insert on jobs
    for each row when (new.status = 'queued') execute function count_queued();
create trigger count_queued after update of status on jobs
    for each row when ((old.status = 'queued') <> (new.status = 'queued')) execute function count_queued();
create trigger count_queued_of_old after delete on jobs
    for each row when (old.status = 'queued') execute function count_queued();
"""
# A row adds its bytes once and takes them away once, when its objects are gone. The parts of a completed upload are the
# file's bytes a second time, and the service deletes them.
STORED = """
create function count_stored() returns trigger language plpgsql as $$
begin
    insert into storage_totals (tenant_id, num_bytes) values (new.tenant_id, new.size_bytes)
    on conflict (tenant_id) do update set num_bytes = storage_totals.num_bytes + excluded.num_bytes;
    return null;
end $$;
create function count_gone() returns trigger language plpgsql as $$
begin
    update storage_totals set num_bytes = num_bytes - old.size_bytes where tenant_id = old.tenant_id;
    return null;
end $$;
"""
STORING = ("files", "uploads", "adapters", "checkpoints", "resume_points")
GONE = {
    "files": "update of purged_at on files for each row when (old.purged_at is null and new.purged_at is not null)",
    "adapters": "update of purged_at on adapters for each row when (old.purged_at is null and new.purged_at is not null)",
    "checkpoints": "update of purged_at on checkpoints for each row"
    " when (old.purged_at is null and new.purged_at is not null)",
    "uploads": "update of purged_at, status on uploads for each row when (old.purged_at is null"
    " and old.status <> 'completed' and (new.purged_at is not null or new.status = 'completed'))",
    "resume_points": "delete on resume_points for each row",
}
COUNT_ALL = """
insert into storage_totals (tenant_id, num_bytes)
select tenant_id, sum(size_bytes) from (
    select tenant_id, size_bytes from files where purged_at is null
    union all select tenant_id, size_bytes from uploads where purged_at is null and status <> 'completed'
    union all select tenant_id, size_bytes from adapters where purged_at is null
    union all select tenant_id, size_bytes from checkpoints where purged_at is null
    union all select tenant_id, size_bytes from resume_points
) stored group by tenant_id
"""
GRANTS = """
grant update (num_paused) on queues to espalier_api;
grant select, insert, update on storage_totals to espalier_api, espalier_worker, espalier_schedule;
grant select on set_asides to espalier_api, espalier_operator;
grant select, insert, update on set_asides to espalier_worker;
grant select, insert, update, delete on set_asides to espalier_schedule;
"""


def upgrade() -> None:
    with unforced():
        _upgrade()
    for table in ("storage_totals", "set_asides"):
        op.execute(f"alter table {table} force row level security")


def _upgrade() -> None:
    _bound_numbers()
    _reserve_names()
    _count_sizes()
    _make_tables()
    _count_waiting()
    op.execute(STORED)
    for table in STORING:
        op.execute(f"create trigger count_stored after insert on {table} for each row execute function count_stored()")
        op.execute(f"create trigger count_gone after {GONE[table]} execute function count_gone()")
    op.execute(COUNT_ALL)
    op.execute(WITHIN_STORAGE_QUOTA)
    for table, name, condition in NEW_CHECKS:
        op.create_check_constraint(op.f(f"ck_{table}_{name}"), table, condition)
    for table, condition in UNPURGED.items():
        op.drop_index(OLD_INDEXES[table][0], table_name=table)
        op.create_index(f"ix_{table}_unpurged", table, ["tenant_id"], postgresql_where=sa.text(condition))
    op.create_index("ix_resume_points_tenant_id", "resume_points", ["tenant_id"])


def _bound_numbers() -> None:
    op.execute(DECAY)
    op.execute(RANK)
    op.execute(WITHIN_GPU_QUOTA.format(seconds="least(u.gpu_seconds, 1e9)"))
    op.execute(OUTLOOK.format(old=OLD_DECAY, new=NEW_DECAY))
    for table, name, _ in OLD_CHECKS:
        op.drop_constraint(op.f(f"ck_{table}_{name}"), table)
    op.execute("update tenants set usage_at = now() where not isfinite(usage_at)")
    for table, column, least, greatest in BOUNDS:
        # PostgreSQL sorts NaN as the greatest number.
        op.execute(
            f"update {table} set {column} = least(greatest({column}, {least}), {greatest})"
            f" where {column} not between {least} and {greatest}"
        )
        op.create_check_constraint(
            op.f(f"ck_{table}_{column}_bounded"), table, f"{column} between {least} and {greatest}"
        )


def _reserve_names() -> None:
    """Give every job the digits that its model's name has or will have, and another's digits to nobody.

    Columns are made by rewriting tables, which no trigger of the audit log hears of.
    """
    op.execute("alter table jobs add column name_digits text default right(gen_random_uuid()::text, 8) not null")
    op.execute("alter table jobs alter column name_digits type text using right(id::text, 8)")
    op.execute("""
        update jobs j set name_digits = right(gen_random_uuid()::text, 8) from (
            select id, row_number() over (
                partition by tenant_id, name_digits order by (status = 'succeeded') desc, id) as place from jobs
        ) numbered where numbered.id = j.id and numbered.place > 1
    """)
    op.create_unique_constraint(op.f("uq_jobs_tenant_id_name_digits"), "jobs", ["tenant_id", "name_digits"])


def _count_sizes() -> None:
    op.execute("alter table checkpoints disable trigger record_change")
    for table in ("checkpoints", "resume_points"):
        op.add_column(table, sa.Column("size_bytes", sa.BigInteger(), server_default="0", nullable=False))
        op.execute(
            f"update {table} set size_bytes = coalesce("
            "(select sum((file ->> 'size_bytes')::bigint) from jsonb_array_elements(files) file), 0)"
        )
    op.execute("alter table checkpoints enable trigger record_change")


def _make_tables() -> None:
    op.add_column("queues", sa.Column("num_paused", sa.BigInteger(), server_default="0", nullable=False))
    op.create_table(
        "storage_totals",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_storage_totals_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_storage_totals")),
    )
    op.create_table(
        "set_asides",
        sa.Column("duty", sa.Text(), nullable=False),
        sa.Column("row_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("num_failures", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("retry_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "duty in ('claim', 'expire', 'purge', 'sweep', 'settle')", name=op.f("ck_set_asides_duty_known")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_set_asides_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("duty", "row_id", name=op.f("pk_set_asides")),
    )
    op.create_index("ix_set_asides_tenant_id", "set_asides", ["tenant_id"])
    own = f"tenant_id = {CURRENT_TENANT}"
    for table in ("storage_totals", "set_asides"):
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"create policy tenant_rows on {table} to espalier_api using ({own}) with check ({own})")
        op.execute(f"create policy service_rows on {table} to espalier_worker, espalier_schedule using (true)")
    op.execute("create policy operator_rows on set_asides for select to espalier_operator using (true)")
    op.execute(GRANTS)


def _count_waiting() -> None:
    _drop_counting("count_queued")
    op.execute(WAITING)
    op.execute("""
        insert into queues (tenant_id, pool, num_queued, num_paused, rank)
        select j.tenant_id, j.pool, 0, count(*), share_rank(t.usage, t.usage_at, t.weight)
        from jobs j join tenants t on t.id = j.tenant_id
        where is_paused_or_pausing(j.status, j.pause_requested_at) group by j.tenant_id, j.pool, t.id
        on conflict (tenant_id, pool) do update set num_paused = excluded.num_paused
    """)


def _drop_counting(name: str) -> None:
    for trigger in (f"{name}_of_new", name, f"{name}_of_old"):
        op.execute(f"drop trigger {trigger} on jobs")
    op.execute(f"drop function {name}")


def downgrade() -> None:
    op.drop_index("ix_resume_points_tenant_id", table_name="resume_points")
    for table, (name, column) in OLD_INDEXES.items():
        op.drop_index(f"ix_{table}_unpurged", table_name=table)
        op.create_index(name, table, [column], postgresql_where=sa.text(UNPURGED[table]))
    for table, name, _ in NEW_CHECKS:
        op.drop_constraint(op.f(f"ck_{table}_{name}"), table)
    op.execute("drop function within_storage_quota")
    for table in STORING:
        op.execute(f"drop trigger count_gone on {table}")
        op.execute(f"drop trigger count_stored on {table}")
    op.execute("drop function count_gone")
    op.execute("drop function count_stored")
    _drop_counting("count_waiting")
    op.execute("drop function is_paused_or_pausing")
    op.execute(QUEUED)
    op.drop_table("set_asides")
    op.drop_table("storage_totals")
    op.drop_column("queues", "num_paused")
    op.drop_column("resume_points", "size_bytes")
    op.drop_column("checkpoints", "size_bytes")
    op.drop_constraint(op.f("uq_jobs_tenant_id_name_digits"), "jobs")
    op.drop_column("jobs", "name_digits")
    for table, column, _, _ in BOUNDS:
        op.drop_constraint(op.f(f"ck_{table}_{column}_bounded"), table)
    for table, name, condition in OLD_CHECKS:
        op.create_check_constraint(op.f(f"ck_{table}_{name}"), table, condition)
    op.execute(OUTLOOK.format(old=NEW_DECAY, new=OLD_DECAY))
    op.execute(WITHIN_GPU_QUOTA.format(seconds="u.gpu_seconds"))
    op.execute(OLD_RANK)
    op.execute("drop function decayed_usage")
