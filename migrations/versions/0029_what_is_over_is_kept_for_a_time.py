"""What is over is kept for a limited time: the schedule may delete rows of jobs that ended long ago, and no others.

A booking outlives its attempt: when the attempt is deleted, the booking stores the job and the pool itself. A separate
function deletes old entries of the audit log. It deletes nothing younger than 90 days, whatever it is asked.
"""

import sqlalchemy as sa
from alembic import op

from migrations.readers import let_readers_in

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None

ROLE = "espalier_outlook"
# The schedule's policies allow all rows. This one limits what it may delete to a day after the job's end. The subquery
# is scalar, because for an EXISTS PostgreSQL might read the whole table of jobs.
OF_JOBS = ("events", "log_lines", "metrics", "attempts", "checkpoints", "adapters")
ENDED = "(select j.finished_at from jobs j where j.id = {table}.job_id) < now() - interval '1 day'"
OLD_ROWS = {
    **{table: ENDED.format(table=table) for table in OF_JOBS},
    "jobs": "finished_at < now() - interval '1 day'",
    "uploads": "purged_at < now() - interval '1 day'",
    "upload_parts": "(select u.purged_at from uploads u where u.id = upload_parts.upload_id) < now() - interval '1 day'",
}
GRANTS = f"""
grant delete on {", ".join(OLD_ROWS)} to espalier_schedule;
grant select on metrics, upload_parts to espalier_schedule;
grant update (deleted_at) on checkpoints to espalier_schedule;
grant update (job_id, pool) on usage to espalier_schedule;
grant select, insert, update on retention_marks to espalier_schedule;
grant select (job_id, pool) on usage to {ROLE};
"""
REVOKES = f"""
revoke select (job_id, pool) on usage from {ROLE};
revoke update (job_id, pool) on usage from espalier_schedule;
revoke update (deleted_at) on checkpoints from espalier_schedule;
revoke select on metrics, upload_parts from espalier_schedule;
revoke delete on {", ".join(OLD_ROWS)} from espalier_schedule;
"""
USAGE = """
create or replace view operator_usage as
select u.tenant_id, coalesce(a.job_id, u.job_id) as job_id, coalesce(j.pool, u.pool) as pool, u.gpu_seconds,
    u.trained_tokens, u.created_at
from usage u left join attempts a on a.id = u.attempt_id left join jobs j on j.id = a.job_id
"""
OLD_USAGE = """
create or replace view operator_usage as
select u.tenant_id, a.job_id, j.pool, u.gpu_seconds, u.trained_tokens, u.created_at
from usage u join attempts a on a.id = u.attempt_id join jobs j on j.id = a.job_id
"""
SIGNATURE = "forget_audit_entries(interval, integer)"
FORGET_AUDIT_ENTRIES = """
create function forget_audit_entries(older_than interval, most integer) returns bigint
language plpgsql security definer set search_path = pg_catalog, public, pg_temp as $$
declare
    num bigint;
begin
    delete from audit_entries
    where number = any(array(select number from audit_entries order by number limit most))
      and created_at < now() - greatest(older_than, interval '90 days');
    get diagnostics num = row_count;
    return num;
end $$
"""
DUTIES = "'claim', 'expire', 'purge', 'sweep', 'settle'"


def _replace_duties(duties: str) -> None:
    op.drop_constraint(op.f("ck_set_asides_duty_known"), "set_asides", type_="check")
    op.create_check_constraint(op.f("ck_set_asides_duty_known"), "set_asides", f"duty in ({duties})")


def _replace_reference(*, on_delete: str) -> None:
    """Let bookings refer to attempts in this way. Existing rows are validated without a lock on them."""
    op.execute("alter table usage drop constraint fk_usage_tenant_id_attempt_id_attempts")
    op.execute(
        "alter table usage add constraint fk_usage_tenant_id_attempt_id_attempts foreign key (tenant_id, attempt_id) "
        f"references attempts (tenant_id, id) {on_delete} not valid"
    )
    op.execute("alter table usage validate constraint fk_usage_tenant_id_attempt_id_attempts")


def upgrade() -> None:
    op.create_table(
        "retention_marks",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("kind", name=op.f("pk_retention_marks")),
    )
    let_readers_in(["retention_marks"])
    op.create_index(
        "ix_jobs_finished_at", "jobs", ["finished_at", "id"], postgresql_where=sa.text("finished_at is not null")
    )
    op.add_column("usage", sa.Column("job_id", sa.Uuid(), nullable=True))
    op.add_column("usage", sa.Column("pool", sa.Text(), nullable=True))
    op.alter_column("usage", "attempt_id", nullable=True)
    op.create_check_constraint(
        op.f("ck_usage_names_its_job"), "usage", "attempt_id is not null or (job_id is not null and pool is not null)"
    )
    _replace_reference(on_delete="on delete set null (attempt_id)")
    _replace_duties(f"{DUTIES}, 'forget'")
    op.execute(GRANTS)
    for table, is_old in OLD_ROWS.items():
        op.execute(f"create policy old_rows on {table} as restrictive for delete to espalier_schedule using ({is_old})")
    op.execute("create policy service_rows on upload_parts to espalier_schedule using (true)")
    op.execute(FORGET_AUDIT_ENTRIES)
    op.execute(f"revoke all on function {SIGNATURE} from public")
    op.execute(f"grant execute on function {SIGNATURE} to espalier_schedule")
    op.execute(USAGE)


def downgrade() -> None:
    op.execute(OLD_USAGE)
    op.execute(f"drop function {SIGNATURE}")
    op.execute("drop policy service_rows on upload_parts")
    for table in OLD_ROWS:
        op.execute(f"drop policy old_rows on {table}")
    op.execute(REVOKES)
    op.execute("delete from set_asides where duty = 'forget'")
    _replace_duties(DUTIES)
    # This fails if a booking has outlived its attempt: a downgrade must not delete bookings.
    op.alter_column("usage", "attempt_id", nullable=False)
    _replace_reference(on_delete="")
    op.drop_constraint(op.f("ck_usage_names_its_job"), "usage", type_="check")
    op.drop_column("usage", "pool")
    op.drop_column("usage", "job_id")
    op.drop_index("ix_jobs_finished_at", table_name="jobs", postgresql_where=sa.text("finished_at is not null"))
    op.drop_table("retention_marks")
