"""Rows for every table, inserted after the migration that makes the table, so that later migrations meet data."""

from __future__ import annotations

from collections.abc import Callable
from string import Template

import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

from core.db.revisions import MIGRATIONS_DIR, list_revisions
from tests.databases import opened

TENANTS = ("01900000-0000-7000-8000-0000000000a1", "01900000-0000-7000-8000-0000000000b2")
_LONG_AGO = "timestamptz '2026-01-02 03:04:05Z'"

_ONCE = {
    "0001": """
        insert into base_models (id, source, dtype, quantizations, target_modules, max_seq_len, max_rank, slots,
            max_tokens_per_step) values ('base', '{}', 'bfloat16', '{nf4}', '{q_proj}', 256, 64, 8, 4096)""",
    "0002": "insert into leaders (name, holder, lease_until) values ('schedule', 'a', $then)",
    "0006": """
        insert into workers (name, pools, state, alive_until) values ('w', '{base@none}', 'idle', $then)""",
    "0008": """
        insert into operator_keys (id, key_id, secret_hash, name)
        values (gen_random_uuid(), 'o', decode(repeat('00', 32), 'hex'), 'olga')""",
    "0011": "insert into base_tokenizers (base_model_id, object_key) values ('base', 'bases/base/tokenizer')",
    "0019": "insert into pools (name, step_seconds, load_seconds) values ('base@none', 1, 2)",
    "0029": "insert into retention_marks values ('events', $then, '00000000-0000-0000-0000-000000000001')",
}
# Once for each tenant, of whose jobs the first waits, the second is done and the third is paused.
_EACH = {
    "0001": """
        insert into tenants (id, slug, name, usage, usage_at) values ('$tenant', 'tenant-$number', 'T', 10, $then);
        insert into api_keys (id, tenant_id, key_id, secret_hash, name)
        values ('$tenant', '$tenant', 'key-$number', decode(repeat('00', 32), 'hex'), 'first');
        insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status)
        values ('$tenant', '$tenant', 'a', 'fine-tune', 10, repeat('0', 64), 'tenants/$tenant/files/a', 4, 'processed');
        insert into jobs (id, tenant_id, base_model_id, pool, training_file_id, spec, total_steps, status, created_at)
        select overlay('$tenant' placing i::text from 34 for 1)::uuid, '$tenant', 'base', 'base@none', '$tenant', '{}', 10,
            'queued', $then from generate_series(1, 3) i;
        update jobs set status = 'succeeded', fine_tuned_model = 'm-$number', started_at = $then,
            finished_at = $then + interval '1 hour' where tenant_id = '$tenant' and id::text like '%2__';
        insert into attempts (id, tenant_id, job_id, number, lease_token, worker_name, entry_charge_seconds, outcome,
            started_at, ended_at)
        select gen_random_uuid(), '$tenant', id, 1, 100 * $number + 1, 'w', 1, 'succeeded', $then, $then
        from jobs where tenant_id = '$tenant' and status = 'succeeded';
        insert into usage (id, tenant_id, attempt_id, gpu_seconds, trained_tokens)
        select gen_random_uuid(), tenant_id, id, 5, 6 from attempts where tenant_id = '$tenant';
        insert into events (id, tenant_id, job_id, level, type, message)
        select gen_random_uuid(), tenant_id, id, 'info', 'message', 'm' from jobs where tenant_id = '$tenant';
        insert into metrics (job_id, step, tenant_id, lease_token, train_loss, train_accuracy, learning_rate, grad_norm,
            num_tokens, created_at)
        select job_id, 32, tenant_id, lease_token, 1, 1, 1, 1, 1, $then from attempts where tenant_id = '$tenant';
        insert into checkpoints (id, tenant_id, job_id, lease_token, step, model_name, object_prefix, files, metrics)
        select gen_random_uuid(), tenant_id, job_id, token, 1, 'm-$number',
            format('tenants/%s/jobs/%s/%s/', tenant_id, job_id, token), '[{"size_bytes": 7}]', '{}'
        from attempts, unnest(array[lease_token, lease_token - 1]) token where tenant_id = '$tenant';
        insert into adapters (id, tenant_id, job_id, name, base_model_id, object_prefix, files, size_bytes, created_at)
        select gen_random_uuid(), tenant_id, job_id, 'm-$number', 'base',
            format('tenants/%s/jobs/%s/%s/adapter/', tenant_id, job_id, lease_token), '[]', 8, $then
        from attempts where tenant_id = '$tenant'""",
    "0004": """
        insert into idempotency_keys (tenant_id, key, request_hash, job_id)
        select tenant_id, 'k', decode(repeat('00', 32), 'hex'), id from jobs
        where tenant_id = '$tenant' and status = 'succeeded'""",
    "0005": """
        insert into uploads (id, tenant_id, filename, purpose, mime_type, size_bytes, expires_at)
        values ('$tenant', '$tenant', 'u', 'fine-tune', 'text/plain', 9, $then);
        insert into upload_parts (id, tenant_id, upload_id, object_key, size_bytes)
        values ('$tenant', '$tenant', '$tenant', 'tenants/$tenant/uploads/u', 9);
        insert into checkpoint_permissions (id, tenant_id, checkpoint_id, project_id)
        select gen_random_uuid(), tenant_id, id, 'tenant-2' from checkpoints
        where tenant_id = '$tenant' and lease_token = 100 * $number""",
    "0006": """
        insert into log_lines (id, tenant_id, job_id, attempt_number, level, name, details)
        select gen_random_uuid(), tenant_id, id, 1, 'info', 'a', '{}' from jobs
        where tenant_id = '$tenant' and status = 'succeeded'""",
    "0010": """
        update jobs set status = 'paused', started_at = $then where tenant_id = '$tenant' and id::text like '%3__';
        insert into attempts (id, tenant_id, job_id, number, lease_token, worker_name, entry_charge_seconds, outcome,
            started_at, ended_at)
        select gen_random_uuid(), '$tenant', id, 1, 100 * $number + 2, 'w', 1, 'paused', $then, $then
        from jobs where tenant_id = '$tenant' and status = 'paused';
        insert into usage (id, tenant_id, attempt_id, gpu_seconds, trained_tokens)
        select gen_random_uuid(), tenant_id, id, 5, 6 from attempts where tenant_id = '$tenant' and outcome = 'paused';
        insert into resume_points (id, tenant_id, job_id, lease_token, step, object_prefix, files)
        select gen_random_uuid(), tenant_id, id, 100 * $number + 2, 1,
            format('tenants/%s/jobs/%s/resume/', tenant_id, id), '[{"size_bytes": 7}]' from jobs
        where tenant_id = '$tenant' and status = 'paused'""",
    "0015": """
        update uploads set status = 'completing', completing_until = $then where tenant_id = '$tenant'""",
    "0016": """
        insert into set_asides (duty, row_id, tenant_id, reason, retry_at)
        values ('claim', '$tenant', '$tenant', 'why', $then)""",
    "0019": """
        insert into attempts (id, tenant_id, job_id, number, lease_token, worker_name, entry_charge_seconds, outcome,
            started_at, ended_at)
        select gen_random_uuid(), '$tenant', id, 2, 100 * $number + 3, 'w', 1, 'lent', $then, $then
        from jobs where tenant_id = '$tenant' and status = 'paused';
        insert into usage (id, tenant_id, attempt_id, gpu_seconds, trained_tokens)
        select gen_random_uuid(), tenant_id, id, 5, 6 from attempts where tenant_id = '$tenant' and outcome = 'lent'""",
}


def configure(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIR))
    config.attributes["connection"] = connection
    return config


def move(owner_url: str, step: Callable[[Config, str], None], revision: str) -> None:
    """Bring a database up or down (alembic's `command.upgrade`, `command.downgrade`) to a revision."""
    with opened(owner_url) as engine, engine.begin() as connection:
        step(configure(connection), revision)


def upgrade_with_rows(owner_url: str, superuser_url: str) -> None:
    """Run every migration as the owner, over the rows that the one before has left."""
    with psycopg.connect(superuser_url, autocommit=True) as superuser:
        for revision in list_revisions():
            move(owner_url, command.upgrade, revision)
            _add_rows(superuser, revision)


def _add_rows(superuser: psycopg.Connection, revision: str) -> None:
    """Put in what a database holds that has been at this revision for a while."""
    statements = [Template(_ONCE.get(revision, "")).substitute(then=_LONG_AGO)]
    for number, tenant in enumerate(TENANTS, 1):
        statements += [Template(_EACH.get(revision, "")).substitute(tenant=tenant, number=number, then=_LONG_AGO)]
    for statement in filter(None, statements):
        superuser.execute(statement.encode())
