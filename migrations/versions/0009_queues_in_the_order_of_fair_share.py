"""One row for each tenant and pool that has, or had, queued jobs: their number, and the tenant's rank in fair share.

Triggers keep both, so no statement that queues, claims or ends a job, or charges a tenant, can forget to. A claim then
reads the start of one short index instead of scoring every tenant.

The rank is log2(usage / weight) + usage_at / half-life. All usages decay with the same half-life. So at any time this
number orders tenants in the same way as their decayed usages per weight, and it changes only when a tenant is charged.
"""

import sqlalchemy as sa
from alembic import op

from migrations.forced import unforced

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

CURRENT_TENANT = "nullif(current_setting('app.tenant_id', true), '')::uuid"
TRIGGERS = """
create function share_rank(usage double precision, usage_at timestamptz, weight double precision)
returns double precision language sql stable as $$
    select case when usage > 0 then ln(usage / weight) / ln(2) + extract(epoch from usage_at) / 21600
        else '-infinity'::double precision end
$$;

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

create function rank_queues() returns trigger language plpgsql as $$
begin
    update queues set rank = share_rank(new.usage, new.usage_at, new.weight) where tenant_id = new.id;
    return null;
end $$;
create trigger rank_queues after update of usage, usage_at, weight on tenants
    for each row execute function rank_queues();
"""
GRANTS = """
grant select, insert, update (num_queued) on queues to espalier_api;
grant select, insert, update on queues to espalier_worker, espalier_schedule;
grant select, update (rank) on queues to espalier_operator;
"""


def upgrade() -> None:
    op.create_table(
        "queues",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("num_queued", sa.BigInteger(), nullable=False),
        sa.Column("rank", sa.Double(), nullable=False),
        sa.CheckConstraint("num_queued >= 0", name=op.f("ck_queues_num_queued_not_negative")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_queues_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "pool", name=op.f("pk_queues")),
    )
    op.create_index(
        "ix_queues_waiting", "queues", ["pool", "rank", "tenant_id"], postgresql_where=sa.text("num_queued > 0")
    )
    op.execute("alter table queues enable row level security")
    op.execute("alter table queues force row level security")
    own = f"tenant_id = {CURRENT_TENANT}"
    op.execute(f"create policy tenant_rows on queues to espalier_api using ({own}) with check ({own})")
    op.execute("create policy service_rows on queues to espalier_worker, espalier_schedule using (true)")
    # Operators change a tenant's weight, and the trigger runs with the rights of the role that changes it.
    op.execute("create policy operator_rows on queues to espalier_operator using (true) with check (true)")
    op.execute(GRANTS)
    op.execute(TRIGGERS)
    with unforced():
        op.execute("""
            insert into queues (tenant_id, pool, num_queued, rank)
            select j.tenant_id, j.pool, count(*), share_rank(t.usage, t.usage_at, t.weight)
            from jobs j join tenants t on t.id = j.tenant_id where j.status = 'queued' group by j.tenant_id, j.pool, t.id
        """)


def downgrade() -> None:
    op.execute("drop trigger rank_queues on tenants")
    op.execute("drop trigger count_queued_of_old on jobs")
    op.execute("drop trigger count_queued on jobs")
    op.execute("drop trigger count_queued_of_new on jobs")
    op.execute("drop function rank_queues")
    op.execute("drop function count_queued")
    op.drop_index("ix_queues_waiting", table_name="queues", postgresql_where=sa.text("num_queued > 0"))
    op.drop_table("queues")
    op.execute("drop function share_rank")
