"""Tenants delete a job, operators a tenant. The schedule then erases their names, and deletes the rows.

The deleting transaction marks the job or the tenant. Policies say what the schedule may do to marked rows. The owner's
functions blank entries of the audit log, and check the mark themselves.
"""

import sqlalchemy as sa
from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None

# What 0029 lets the schedule delete. Here and below subqueries are scalar, because for an EXISTS PostgreSQL might read
# the whole table.
OF_JOBS = ("events", "log_lines", "metrics", "attempts", "checkpoints", "adapters")
ENDED = "(select j.finished_at from jobs j where j.id = {table}.job_id) < now() - interval '1 day'"
OLD_ROWS = {
    **{table: ENDED.format(table=table) for table in OF_JOBS},
    "jobs": "finished_at < now() - interval '1 day'",
    "uploads": "purged_at < now() - interval '1 day'",
    "upload_parts": "(select u.purged_at from uploads u where u.id = upload_parts.upload_id) < now() - interval '1 day'",
}
OF_A_DELETED_JOB = "(select j.deleted_at from jobs j where j.id = {table}.job_id) is not null"
OF_A_DELETED_TENANT = "(select t.deleted_at from tenants t where t.id = {table}.tenant_id) is not null"
OR_DELETED = {
    **dict.fromkeys(OF_JOBS, OF_A_DELETED_JOB),
    "jobs": "deleted_at is not null",
    "uploads": f"purged_at is not null and {OF_A_DELETED_TENANT}",
    "upload_parts": OF_A_DELETED_TENANT,
}
# What the schedule may delete since this version, and nothing else.
DELETED_ROWS = {
    **dict.fromkeys(("api_keys", "queues", "storage_totals"), OF_A_DELETED_TENANT),
    "files": f"purged_at is not null and (purpose = 'fine-tune-results' or {OF_A_DELETED_TENANT})",
    "checkpoint_permissions": "(select c.deleted_at from checkpoints c where c.id = {table}.checkpoint_id) is not null",
}
# What the owner sees when its functions read marks, because row-level security binds the owner too.
SEEN_BY_OWNER = {
    **dict.fromkeys(("tenants", "jobs", "adapters", "checkpoints"), "deleted_at is not null"),
    "checkpoint_permissions": "true",
}
BLANKED = {
    "jobs": "deleted_at, blanked_at, suffix, metadata, spec, request_hash, datasets, fine_tuned_model, traceparent",
    "adapters": "deleted_at, name, files",
    "checkpoints": "model_name, files, metrics",
    "files": "filename, status_details, problems, report",
    "uploads": "status, completing_until, filename, mime_type",
    "tenants": "erased_at",
}
GRANTS = f"""
grant update (deleted_at) on jobs to espalier_api;
grant update (slug, deleted_at) on tenants to espalier_operator;
grant delete on {", ".join(DELETED_ROWS)} to espalier_schedule;
grant select on checkpoint_permissions to espalier_schedule;
grant select (tenant_id) on api_keys to espalier_schedule;
"""
REVOKES = f"""
revoke select (tenant_id) on api_keys from espalier_schedule;
revoke select on checkpoint_permissions from espalier_schedule;
revoke delete on {", ".join(DELETED_ROWS)} from espalier_schedule;
revoke update (slug) on tenants from espalier_operator;
"""
# A mark counts as a deletion in the audit log. The other lines of the function are unchanged.
ACTION = "case tg_op when 'INSERT' then '.created' when 'UPDATE' then '.changed' else '.deleted' end"
NEW_ACTION = (
    "case when tg_op = 'INSERT' then '.created' when tg_op = 'DELETE' "
    "or tg_argv[0] in ('tenant', 'job') and new_values ? 'deleted_at' then '.deleted' else '.changed' end"
)
REPLACE = """
do $body$ begin
    execute replace(pg_get_functiondef('record_change()'::regprocedure), $old${old}$old$, $new${new}$new$);
end $body$
"""
# The schedule's deletions are not recorded: no person makes them, and the entries would contain the erased names.
BY_PEOPLE = "when (current_user not in ('espalier_worker', 'espalier_schedule'))"
RECORDED = {
    "api_keys": ("insert or delete or update of scopes, expires_at, revoked_at, name", "'api_key', 'key_id'"),
    "checkpoint_permissions": ("insert or update or delete", "'checkpoint_permission', 'id'"),
}
FUNCTIONS = {
    "blank_audit_entries_of_job(uuid)": "espalier_schedule",
    "blank_audit_entries_of_tenant(uuid, integer)": "espalier_schedule",
    "withdraw_permissions_of(uuid, text)": "espalier_operator",
}
BLANK_OF_JOB = """
create function blank_audit_entries_of_job(of_job uuid) returns bigint
language plpgsql security definer set search_path = pg_catalog, public, pg_temp as $$
declare
    job constant jobs := (select j from jobs j where j.id = of_job and j.deleted_at is not null);
    num bigint;
begin
    update audit_entries set before = '{}', after = '{}'
    where tenant_id = job.tenant_id and (before <> '{}' or after <> '{}') and subject = any(array(
        select job.id::text
        union all select job.result_file_id::text
        union all select a.id::text from adapters a where a.job_id = job.id
        union all select c.id::text from checkpoints c where c.job_id = job.id
        union all select p.id::text from checkpoint_permissions p join checkpoints c on c.id = p.checkpoint_id
            where c.job_id = job.id));
    get diagnostics num = row_count;
    return num;
end $$
"""
# The entries about a tenant's own row contain its slug, which is a name.
BLANK_OF_TENANT = """
create function blank_audit_entries_of_tenant(of_tenant uuid, most integer) returns bigint
language plpgsql security definer set search_path = pg_catalog, public, pg_temp as $$
declare
    new_slug constant text := (select t.slug from tenants t where t.id = of_tenant and t.deleted_at is not null);
    num bigint;
begin
    update audit_entries set before = '{}', after = '{}',
        subject = case when starts_with(action, 'tenant.') then new_slug else subject end
    where new_slug is not null and number = any(array(
        select number from audit_entries
        where tenant_id = of_tenant
          and (before <> '{}' or after <> '{}' or starts_with(action, 'tenant.') and subject <> new_slug)
        limit most));
    get diagnostics num = row_count;
    return num;
end $$
"""
# The next tenant with this slug must not get what was shared with this one. In the audit log of the tenants that
# shared, an id replaces the slug.
WITHDRAW = """
create function withdraw_permissions_of(of_tenant uuid, old_slug text) returns void
language plpgsql security definer set search_path = pg_catalog, public, pg_temp as $$
declare
    wire_id constant text := 'org-' || replace(of_tenant::text, '-', '');
begin
    if not exists (select from tenants t where t.id = of_tenant and t.deleted_at is not null) then
        raise exception 'tenant % is not deleted', of_tenant;
    end if;
    delete from checkpoint_permissions where project_id in (old_slug, wire_id);
    update audit_entries set
        before = case when before ? 'project_id' then before || jsonb_build_object('project_id', wire_id) else before end,
        after = case when after ? 'project_id' then after || jsonb_build_object('project_id', wire_id) else after end
    where starts_with(action, 'checkpoint_permission.')
      and coalesce(after ->> 'project_id', before ->> 'project_id') = old_slug;
end $$
"""
DUTIES = "'claim', 'expire', 'purge', 'sweep', 'settle', 'forget'"


def _replace_duties(duties: str) -> None:
    op.drop_constraint(op.f("ck_set_asides_duty_known"), "set_asides", type_="check")
    op.create_check_constraint(op.f("ck_set_asides_duty_known"), "set_asides", f"duty in ({duties})")


def _record(conditions: dict[str, str]) -> None:
    for table, (verbs, arguments) in RECORDED.items():
        op.execute(f"drop trigger record_change on {table}")
        op.execute(
            f"create trigger record_change after {verbs} on {table} for each row {conditions[table]} "
            f"execute function record_change({arguments})"
        )


def upgrade() -> None:
    op.add_column("jobs", sa.Column("deleted_at", sa.DateTime(timezone=True)))
    op.add_column("jobs", sa.Column("blanked_at", sa.DateTime(timezone=True)))
    op.create_check_constraint(
        op.f("ck_jobs_ended_when_deleted"), "jobs", "deleted_at is null or finished_at is not null"
    )
    op.create_index(
        "ix_jobs_to_erase",
        "jobs",
        ["deleted_at", "id"],
        postgresql_where=sa.text("deleted_at is not null and (blanked_at is null or swept_at is not null)"),
    )
    op.add_column("tenants", sa.Column("deleted_at", sa.DateTime(timezone=True)))
    op.add_column("tenants", sa.Column("erased_at", sa.DateTime(timezone=True)))
    op.create_check_constraint(
        op.f("ck_tenants_disabled_when_deleted"), "tenants", "deleted_at is null or disabled_at is not null"
    )
    op.create_index("ix_audit_entries_subject", "audit_entries", ["subject"])
    op.create_index(
        "ix_audit_entries_project_id",
        "audit_entries",
        [sa.text("coalesce(after ->> 'project_id', before ->> 'project_id')")],
        postgresql_where=sa.text("starts_with(action, 'checkpoint_permission.')"),
    )
    _replace_duties(f"{DUTIES}, 'erase'")
    _open_rows()
    op.execute(REPLACE.format(old=ACTION, new=NEW_ACTION))
    _record(dict.fromkeys(RECORDED, BY_PEOPLE))
    for function in (BLANK_OF_JOB, BLANK_OF_TENANT, WITHDRAW):
        op.execute(function)
    for signature, role in FUNCTIONS.items():
        op.execute(f"revoke all on function {signature} from public")
        op.execute(f"grant execute on function {signature} to {role}")


def _open_rows() -> None:
    op.execute(GRANTS)
    for table, columns in BLANKED.items():
        op.execute(f"grant update ({columns}) on {table} to espalier_schedule")
    op.execute("create policy service_rows on checkpoint_permissions to espalier_schedule using (true)")
    for table, is_seen in SEEN_BY_OWNER.items():
        verb = "all" if table == "checkpoint_permissions" else "select"
        op.execute(f"create policy marked_rows on {table} for {verb} to current_user using ({is_seen})")
    for table, is_old in OLD_ROWS.items():
        op.execute(f"alter policy old_rows on {table} using ({is_old} or {OR_DELETED[table].format(table=table)})")
    for table, condition in DELETED_ROWS.items():
        is_deleted = condition.format(table=table)
        op.execute(
            f"create policy deleted_rows on {table} as restrictive for delete to espalier_schedule using ({is_deleted})"
        )


def downgrade() -> None:
    """Go back. A deleted job would be visible again, so this fails while one waits to be erased."""
    op.execute("alter table jobs add constraint no_deleted_job check (deleted_at is null)")
    for signature in FUNCTIONS:
        op.execute(f"drop function {signature}")
    _record({"api_keys": "", "checkpoint_permissions": ""})
    op.execute(REPLACE.format(old=NEW_ACTION, new=ACTION))
    _close_rows()
    op.execute("delete from set_asides where duty = 'erase'")
    _replace_duties(DUTIES)
    op.drop_index("ix_audit_entries_project_id", table_name="audit_entries")
    op.drop_index("ix_audit_entries_subject", table_name="audit_entries")
    op.drop_constraint(op.f("ck_tenants_disabled_when_deleted"), "tenants", type_="check")
    op.drop_column("tenants", "erased_at")
    op.drop_column("tenants", "deleted_at")
    op.drop_column("jobs", "blanked_at")
    op.drop_column("jobs", "deleted_at")  # and its constraints and index


def _close_rows() -> None:
    for table in DELETED_ROWS:
        op.execute(f"drop policy deleted_rows on {table}")
    for table, is_old in OLD_ROWS.items():
        op.execute(f"alter policy old_rows on {table} using ({is_old})")
    for table in SEEN_BY_OWNER:
        op.execute(f"drop policy marked_rows on {table}")
    op.execute("drop policy service_rows on checkpoint_permissions")
    op.execute(REVOKES)
    for table, columns in BLANKED.items():
        op.execute(f"revoke update ({columns}) on {table} from espalier_schedule")
