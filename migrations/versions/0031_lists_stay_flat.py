"""A page of a job's history costs the same however much others have written, and so does a chart of its steps.

Events and log lines lose the index on their numbers alone: PostgreSQL used it to find a job's newest events, and
scanned the newer events of all jobs. A number is still unique, because only the table draws it. Every 32 steps of a job
are summed up in one row as they are recorded, and charts read these rows.
"""

import sqlalchemy as sa
from alembic import op

from migrations.forced import unforced
from migrations.readers import let_readers_in

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None

CURRENT_TENANT = "nullif(current_setting('app.tenant_id', true), '')::uuid"
SUM = """
select m.job_id, {last_step} as last_step, m.tenant_id, count(*) as num_steps, min(m.train_loss) as least_loss,
    (array_agg(m.step order by m.train_loss, m.step desc))[1] as least_step, max(m.train_loss) as greatest_loss,
    (array_agg(m.step order by m.train_loss desc, m.step desc))[1] as greatest_step,
    max(m.step) filter (where m.valid_loss is not null) as evaluated_step
from metrics m where {wanted} group by m.job_id, m.tenant_id, 2
"""
# The steps of a job are recorded in order, so a block with its last step is complete. A block whose last step was
# skipped is never summed up; its few rows are read instead.
OF_NEW_STEP = SUM.format(
    last_step="new.step", wanted="m.job_id = new.job_id and m.step > new.step - 32 and m.step <= new.step"
)
FILL = SUM.format(last_step="(m.step + 31) / 32 * 32", wanted="{wanted}") + "having max(m.step) % 32 = 0"
INSERT = """
insert into metric_blocks (job_id, last_step, tenant_id, num_steps, least_loss, least_step, greatest_loss, greatest_step,
    evaluated_step)
"""
# The plan is kept as long as a worker's connection, even if this begins while the table is small.
SUM_UP = f"""
create function sum_up_steps() returns trigger language plpgsql
set search_path = pg_catalog, public, pg_temp set enable_seqscan = off as $$
begin
    {INSERT} {OF_NEW_STEP} on conflict do nothing;
    return null;
end $$
"""
NOTE_EVALUATION = """
create function note_evaluation() returns trigger language plpgsql set search_path = pg_catalog, public, pg_temp as $$
begin
    update metric_blocks set evaluated_step = greatest(evaluated_step, new.step)
    where job_id = new.job_id and last_step = (new.step + 31) / 32 * 32;
    return null;
end $$
"""
# A job that resumes from a resume point records the later steps again, and old steps are deleted by age.
FORGET_STEPS = """
create function forget_steps() returns trigger language plpgsql set search_path = pg_catalog, public, pg_temp as $$
begin
    delete from metric_blocks where job_id = old.job_id and last_step = old.step;
    return null;
end $$
"""
TRIGGERS = """
create trigger sum_up_steps after insert on metrics for each row when (new.step % 32 = 0) execute function sum_up_steps();
create trigger note_evaluation after update of valid_loss on metrics for each row
    when (new.valid_loss is not null) execute function note_evaluation();
create trigger forget_steps after delete on metrics for each row when (old.step % 32 = 0) execute function forget_steps()
"""
# Rows that were written after the summing up, and before the triggers existed.
OF_JOBS_AT_WORK = "m.job_id in (select a.job_id from attempts a where a.outcome is null or a.ended_at >= now())"
# An explanation counts a pool's jobs of two statuses. Each status has its own index; there is none for both together.
OUTLOOK = """
do $$ begin
    execute replace(pg_get_functiondef('queue_outlook(text, uuid, float8, float8, float8, bigint)'::regprocedure),
        $old${old}$old$, $new${new}$new$);
end $$
"""
OUTLOOK_ROLE = "espalier_outlook"
OF_EITHER = "from jobs j where j.pool = wanted_pool and j.status in ('queued', 'running') group by j.tenant_id"
OF_EACH = """from (
            select tenant_id, status, run_after from jobs where pool = wanted_pool and status = 'queued'
            union all select tenant_id, status, run_after from jobs where pool = wanted_pool and status = 'running'
        ) j group by j.tenant_id"""


def _replace_outlook(old: str, new: str) -> None:
    op.execute(f"grant create on schema public to {OUTLOOK_ROLE}")
    op.execute(OUTLOOK.format(old=old, new=new))
    op.execute(f"revoke create on schema public from {OUTLOOK_ROLE}")


def upgrade() -> None:
    op.create_table(
        "metric_blocks",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("num_steps", sa.BigInteger(), nullable=False),
        sa.Column("least_loss", sa.Double(), nullable=False),
        sa.Column("least_step", sa.BigInteger(), nullable=False),
        sa.Column("greatest_loss", sa.Double(), nullable=False),
        sa.Column("greatest_step", sa.BigInteger(), nullable=False),
        sa.Column("evaluated_step", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("job_id", "last_step", name=op.f("pk_metric_blocks")),
    )
    op.execute(SUM_UP)
    op.execute(NOTE_EVALUATION)
    op.execute(FORGET_STEPS)
    # Statements that lock written tables come last, so that jobs continue while the rows are summed up.
    with unforced():
        op.execute(f"{INSERT} {FILL.format(wanted='true')}")
        op.execute(TRIGGERS)
        fill = FILL.format(wanted=OF_JOBS_AT_WORK)
        op.execute(
            f"{INSERT} {fill} on conflict (job_id, last_step) do update set evaluated_step = excluded.evaluated_step"
        )
        op.create_foreign_key(
            op.f("fk_metric_blocks_tenant_id_job_id_jobs"),
            "metric_blocks",
            "jobs",
            ["tenant_id", "job_id"],
            ["tenant_id", "id"],
            ondelete="CASCADE",
        )
    own = f"tenant_id = {CURRENT_TENANT}"
    op.execute("alter table metric_blocks enable row level security")
    op.execute("alter table metric_blocks force row level security")
    op.execute(f"create policy tenant_rows on metric_blocks to espalier_api using ({own}) with check ({own})")
    op.execute("create policy service_rows on metric_blocks to espalier_worker, espalier_schedule using (true)")
    op.execute("grant select on metric_blocks to espalier_api")
    op.execute("grant select, insert, update (evaluated_step), delete on metric_blocks to espalier_worker")
    op.execute("grant select, delete on metric_blocks to espalier_schedule")
    let_readers_in(["metric_blocks"])
    _replace_outlook(OF_EITHER, OF_EACH)
    op.drop_constraint(op.f("uq_events_number"), "events", type_="unique")
    op.drop_constraint(op.f("uq_log_lines_number"), "log_lines", type_="unique")
    op.execute("analyze metric_blocks")  # its rows are not counted yet, and plans depend on the count


def downgrade() -> None:
    op.create_unique_constraint(op.f("uq_log_lines_number"), "log_lines", ["number"])
    op.create_unique_constraint(op.f("uq_events_number"), "events", ["number"])
    _replace_outlook(OF_EACH, OF_EITHER)
    op.execute("drop trigger forget_steps on metrics")
    op.execute("drop trigger note_evaluation on metrics")
    op.execute("drop trigger sum_up_steps on metrics")
    op.execute("drop function forget_steps()")
    op.execute("drop function note_evaluation()")
    op.execute("drop function sum_up_steps()")
    op.drop_table("metric_blocks")
