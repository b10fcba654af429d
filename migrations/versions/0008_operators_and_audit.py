"""Operators have a role and keys of their own, every change is recorded, and tenants have an allow-list and quotas.

`espalier_operator` cannot log in. The API's login may become it for a transaction (`set local role`) and has none of
its rights otherwise. So a query that forgot to become it fails instead of reading across tenants. Triggers that run as
the tables' owner record the changes: no runtime role may write, change or delete an audit entry.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

CURRENT_TENANT = "nullif(current_setting('app.tenant_id', true), '')::uuid"
TENANT_SETTINGS = (
    "name, weight, max_running, max_queued, max_storage_bytes, max_tokens_per_job, max_gpu_seconds_per_month, "
    "requests_per_minute, allowed_base_models, disabled_at"
)
# The function of each table's trigger, with the table's noun and the column that names a row to people.
RECORD_CHANGE = """
create function record_change() returns trigger language plpgsql security definer
set search_path = public, pg_temp as $$
declare
    hidden constant text[] := '{secret_hash,usage,usage_at,last_used_at,spec,metadata,problems,status_details,error}';
    old_row constant jsonb := case when tg_op = 'INSERT' then '{}'::jsonb else to_jsonb(old) - hidden end;
    new_row constant jsonb := case when tg_op = 'DELETE' then '{}'::jsonb else to_jsonb(new) - hidden end;
    one_row constant jsonb := case when tg_op = 'DELETE' then old_row else new_row end;
    old_values jsonb;
    new_values jsonb;
begin
    select coalesce(jsonb_object_agg(key, value), '{}') into old_values
        from jsonb_each(old_row) where new_row -> key is distinct from value;
    select coalesce(jsonb_object_agg(key, value), '{}') into new_values
        from jsonb_each(new_row) where old_row -> key is distinct from value;
    if old_values = new_values then
        return null;
    end if;
    insert into audit_entries (tenant_id, actor, action, subject, before, after) values (
        (one_row ->> (case when tg_argv[0] = 'tenant' then 'id' else 'tenant_id' end))::uuid,
        coalesce(nullif(current_setting('app.actor', true), ''), session_user),
        tg_argv[0] || case tg_op when 'INSERT' then '.created' when 'UPDATE' then '.changed' else '.deleted' end,
        one_row ->> tg_argv[1],
        old_values,
        new_values
    );
    return null;
end $$
"""
# Workers and the schedule change these rows during a job's life. Its attempts and events record that.
BY_PEOPLE = "when (current_user not in ('espalier_worker', 'espalier_schedule'))"
RECORDED = {
    "tenants": ("insert or delete or update of slug, " + TENANT_SETTINGS, "", "'tenant', 'slug'"),
    "api_keys": ("insert or delete or update of scopes, expires_at, revoked_at, name", "", "'api_key', 'key_id'"),
    "operator_keys": ("insert or delete or update of revoked_at, name", "", "'operator_key', 'key_id'"),
    "base_models": ("insert or delete or update", "", "'base_model', 'id'"),
    "files": ("insert or delete or update", BY_PEOPLE, "'file', 'id'"),
    "jobs": ("insert or delete or update", BY_PEOPLE, "'job', 'id'"),
    "adapters": ("insert or delete or update", BY_PEOPLE, "'adapter', 'id'"),
}
OPERATOR_ROLE = """
do $$ begin
    create role espalier_operator nologin;
exception when duplicate_object then null;
end $$;
grant usage on schema public to espalier_operator;
do $$ begin
    if (select rolinherit from pg_roles where rolname = 'espalier_api') then
        alter role espalier_api noinherit;
    end if;
    if not pg_has_role('espalier_api', 'espalier_operator', 'MEMBER') then
        grant espalier_operator to espalier_api;
    end if;
    if not pg_has_role(current_user, 'espalier_operator', 'MEMBER') then
        execute format('grant espalier_operator to %I', current_user);
    end if;
end $$;
"""
GRANTS = f"""
grant select, insert, update ({TENANT_SETTINGS}) on tenants to espalier_operator;
grant select, insert, update (revoked_at) on api_keys to espalier_operator;
grant select, update (disabled_at) on base_models to espalier_operator;
grant select, insert, update (revoked_at, last_used_at) on operator_keys to espalier_operator;
grant select on audit_entries to espalier_api, espalier_operator;
create policy operator_rows on tenants to espalier_operator using (true) with check (true);
create policy operator_rows on api_keys to espalier_operator using (true) with check (true);
alter table audit_entries enable row level security;
alter table audit_entries force row level security;
create policy tenant_rows on audit_entries to espalier_api using (tenant_id = {CURRENT_TENANT}) with check (false);
create policy operator_rows on audit_entries to espalier_operator using (true) with check (false);
create policy owner_rows on audit_entries to current_user using (true) with check (true);
alter table base_models enable row level security;
alter table base_models force row level security;
create policy allowed_rows on base_models for select to espalier_api using (exists (
    select from tenants t where t.id = {CURRENT_TENANT}
    and (t.allowed_base_models is null or base_models.id = any (t.allowed_base_models))));
create policy service_rows on base_models for select to espalier_worker, espalier_schedule using (true);
create policy operator_rows on base_models to espalier_operator using (true) with check (true);
create policy owner_rows on base_models to current_user using (true) with check (true);
"""


def upgrade() -> None:
    op.add_column("tenants", sa.Column("max_storage_bytes", sa.BigInteger(), nullable=True))
    op.add_column("tenants", sa.Column("max_tokens_per_job", sa.BigInteger(), nullable=True))
    op.add_column("tenants", sa.Column("max_gpu_seconds_per_month", sa.Double(), nullable=True))
    op.add_column("tenants", sa.Column("requests_per_minute", sa.BigInteger(), nullable=True))
    op.add_column("tenants", sa.Column("allowed_base_models", sa.ARRAY(sa.Text()), nullable=True))
    op.create_check_constraint(
        op.f("ck_tenants_limits_not_negative"),
        "tenants",
        "max_storage_bytes >= 0 and max_tokens_per_job >= 0 and max_gpu_seconds_per_month >= 0 "
        "and requests_per_minute >= 1",
    )
    op.add_column("base_models", sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "operator_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("length(secret_hash) = 32", name=op.f("ck_operator_keys_secret_hash_length")),
        sa.CheckConstraint("length(name) between 1 and 64", name=op.f("ck_operator_keys_name_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operator_keys")),
        sa.UniqueConstraint("key_id", name=op.f("uq_operator_keys_key_id")),
    )
    op.create_table(
        "audit_entries",
        sa.Column("number", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("before", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("after", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit_entries")),
    )
    op.create_index("ix_audit_entries_tenant_id_number", "audit_entries", ["tenant_id", "number"])
    op.execute(OPERATOR_ROLE)
    op.execute(GRANTS)
    op.execute(RECORD_CHANGE)
    op.execute("revoke execute on function record_change() from public")
    for table, (verbs, condition, arguments) in RECORDED.items():
        op.execute(
            f"create trigger record_change after {verbs} on {table} for each row {condition} "
            f"execute function record_change({arguments})"
        )


def downgrade() -> None:
    for table in RECORDED:
        op.execute(f"drop trigger record_change on {table}")
    op.execute("drop function record_change()")
    for policy in ("allowed_rows", "service_rows", "operator_rows", "owner_rows"):
        op.execute(f"drop policy {policy} on base_models")
    op.execute("alter table base_models no force row level security")
    op.execute("alter table base_models disable row level security")
    op.execute("drop policy operator_rows on tenants")
    op.execute("drop policy operator_rows on api_keys")
    op.drop_table("audit_entries")
    op.drop_table("operator_keys")
    op.drop_column("base_models", "disabled_at")
    op.drop_constraint(op.f("ck_tenants_limits_not_negative"), "tenants")
    for column in (
        "allowed_base_models",
        "requests_per_minute",
        "max_gpu_seconds_per_month",
        "max_tokens_per_job",
        "max_storage_bytes",
    ):
        op.execute(f"revoke update ({column}) on tenants from espalier_operator")
        op.drop_column("tenants", column)
    # The role stays: it belongs to the whole cluster, and another database may use it.
    op.execute("revoke all on tenants, api_keys, base_models from espalier_operator")
