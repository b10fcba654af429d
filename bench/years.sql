-- Years of rows, as the service would have left them: 20,000 jobs, of which 16,000 are one tenant's and one has 300,000
-- steps; 1.2 million events of that tenant and 700,000 later ones of others, each step with its metrics; log lines,
-- attempts, usage, artifacts and audit entries in proportion. What ran at the same time lies on the same pages.
set session_replication_role = replica;  -- no trigger counts the rows one by one
create temp table seed as select * from jobs where id = %(seed)s;

update tenants set max_running = 100;
insert into tenants (id, slug, name, max_running, created_at)
    select uuidv7(), 'other-' || n, 'Other ' || n, 100, now() - interval '3 years' from generate_series(1, 199) n;
create temp table others as
    select id as tenant_id, row_number() over (order by slug) - 1 as i from tenants where slug like 'other-%%';
create temp table training_files as
    select tenant_id, training_file_id as file_id from seed
    union all select tenant_id, uuidv7(interval '-3 years') from others;
insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status, created_at)
    select file_id, tenant_id, 'rows.jsonl', 'fine-tune', 1000, repeat('0', 64),
        format('tenants/%%s/files/%%s/content.jsonl', tenant_id, file_id), 10, 'processed', now() - interval '3 years'
    from training_files where tenant_id <> (select tenant_id from seed);

-- A job an hour; the last are at work or wait.
create temp table planted as
    select n, uuidv7(-(20001 - n) * interval '1 hour') as job_id, uuidv7() as file_id, n = 10001 as is_long,
        case when n %% 5 = 0 then o.tenant_id else s.tenant_id end as tenant_id,
        now() - (20001 - n) * interval '1 hour' as created_at,
        now() - (20001 - n) * interval '1 hour' + interval '5 minutes' as started_at,
        now() - (20001 - n) * interval '1 hour' + case when n = 10001 then interval '4 days' else interval '40 minutes' end
            as ended_at,
        case when n > 19950 then 'queued' when n > 19930 then 'running' when n > 19920 then 'paused'
            when n = 10001 then 'succeeded' when n %% 20 = 0 then 'failed' when n %% 20 = 2 then 'cancelled'
            else 'succeeded' end as status,
        case when n > 19950 then 0 when n %% 5 = 1 then 2 else 1 end as num_attempts,
        2 * n as token, case when n = 10001 then 300000 else 200 end as num_steps
    from generate_series(1, 20000) n cross join seed s join others o on o.i = n / 5 %% 199;
select setval('lease_tokens', 100000);
insert into jobs (id, tenant_id, base_model_id, pool, training_file_id, name_digits, metadata, spec, total_steps, status,
    attempt_count, lease_token, lease_until, trained_steps, trained_tokens, fine_tuned_model, result_file_id, error,
    started_at, finished_at, swept_at, created_at)
    select p.job_id, p.tenant_id, s.base_model_id, s.pool, f.file_id, lpad(to_hex(n), 8, '0'),
        jsonb_build_object('project', 'p' || n %% 10), s.spec, num_steps, p.status, num_attempts,
        case when p.status = 'running' then token end, case when p.status = 'running' then now() + interval '1 day' end,
        case when p.status = 'queued' then 0 else num_steps end, case when p.status = 'succeeded' then 10000 end,
        case when p.status = 'succeeded' then format('ft:%%s:%%s::%%s', s.base_model_id, t.slug, lpad(to_hex(n), 8, '0')) end,
        case when p.status = 'succeeded' then p.file_id end,
        case when p.status = 'failed' then '{"code": "diverged", "message": "The loss is not finite.", "param": null}'::jsonb end,
        case when p.status <> 'queued' then p.started_at end,
        case when p.status in ('succeeded', 'failed', 'cancelled') then p.ended_at end,
        case when p.status in ('succeeded', 'failed', 'cancelled') then p.ended_at + interval '1 day' end, p.created_at
    from planted p cross join seed s join tenants t on t.id = p.tenant_id join training_files f on f.tenant_id = p.tenant_id;
delete from queues;
insert into queues (tenant_id, pool, num_queued, num_paused, rank)
    select j.tenant_id, j.pool, count(*) filter (where status = 'queued'), count(*) filter (where status = 'paused'),
        share_rank(min(t.usage), min(t.usage_at), min(t.weight))
    from jobs j join tenants t on t.id = j.tenant_id group by j.tenant_id, j.pool;
insert into pools (name, step_seconds, load_seconds) select pool, 0.5, 20 from seed on conflict do nothing;
insert into workers (name, pools, state, pool, slots, slots_in_use, alive_until)
    select 'worker-' || n, array[s.pool], 'serving', s.pool, 8, 1, now() + interval '1 day'
    from generate_series(1, 20) n cross join seed s;

insert into attempts (id, tenant_id, job_id, number, lease_token, worker_name, entry_charge_seconds, used_seconds,
    stepping_at, outcome, started_at, ended_at, left_device_at)
    select uuidv7(), tenant_id, job_id, try, token - num_attempts + try, 'worker-' || n %% 20 + 1, 5, 60, started_at,
        case when try < num_attempts then 'lost' when status = 'running' then null else status end, started_at,
        case when try < num_attempts or status <> 'running' then ended_at end,
        case when try < num_attempts or status <> 'running' then ended_at end
    from planted cross join lateral generate_series(1, num_attempts) try;
insert into usage (id, tenant_id, attempt_id, gpu_seconds, trained_tokens, created_at)
    select uuidv7(), tenant_id, id, 60, 10000, ended_at from attempts where ended_at is not null;

insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status, created_at)
    select file_id, tenant_id, 'step_metrics.csv', 'fine-tune-results', 1000, repeat('0', 64),
        format('tenants/%%s/files/%%s/content.jsonl', tenant_id, file_id), 0, 'processed', ended_at
    from planted where status = 'succeeded';
insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status, created_at)
    select id, tenant_id, 'rows.jsonl', 'fine-tune', 1000, repeat('0', 64),
        format('tenants/%%s/files/%%s/content.jsonl', tenant_id, id), 10, 'processed', now()
    from (select uuidv7(-n * interval '4 hours') as id, tenant_id from generate_series(1, 4000) n, seed) made;
insert into uploads (id, tenant_id, filename, purpose, mime_type, size_bytes, status, file_id, expires_at, purged_at)
    select uuidv7(-n * interval '4 hours'), tenant_id, 'rows.jsonl', 'fine-tune', 'text/jsonl', 1000, 'completed',
        training_file_id, now(), now() from generate_series(1, 4000) n, seed;
insert into adapters (id, tenant_id, job_id, name, base_model_id, object_prefix, files, size_bytes, created_at)
    select uuidv7(j.finished_at - now()), j.tenant_id, j.id, j.fine_tuned_model, j.base_model_id,
        format('tenants/%%s/jobs/%%s/%%s/adapter/', j.tenant_id, j.id, p.token),
        '[{"name": "adapter_model.safetensors", "size_bytes": 1000, "sha256": "00"}]', 1000, j.finished_at
    from planted p join jobs j on j.id = p.job_id where p.status = 'succeeded';
insert into checkpoints (id, tenant_id, job_id, lease_token, step, model_name, object_prefix, files, size_bytes, metrics,
    created_at)
    select uuidv7(j.finished_at - now()), j.tenant_id, j.id, p.token, step, j.fine_tuned_model || ':ckpt-step-' || step,
        format('tenants/%%s/jobs/%%s/%%s/checkpoint-%%s/', j.tenant_id, j.id, p.token, step),
        '[{"name": "adapter_model.safetensors", "size_bytes": 1000, "sha256": "00"}]', 1000, '{"train_loss": 1.5}',
        j.finished_at
    from planted p join jobs j on j.id = p.job_id cross join lateral generate_series(50, num_steps, case when is_long then 1000 else 50 end) step
    where p.status = 'succeeded';
insert into checkpoint_permissions (id, tenant_id, checkpoint_id, project_id)
    select uuidv7(), c.tenant_id, c.id, 'other-' || n from generate_series(1, 199) n,
        (select c.* from checkpoints c join planted p on p.job_id = c.job_id where p.is_long order by step desc limit 1) c;
insert into resume_points (id, tenant_id, job_id, lease_token, step, object_prefix, files, size_bytes)
    select uuidv7(), tenant_id, job_id, token, 100, format('tenants/%%s/jobs/%%s/%%s/resume-100/', tenant_id, job_id, token),
        '[]', 1000 from planted where status in ('running', 'paused');

-- Event i of the tenant is the long job's for every fourth i: what trains at the same time is written side by side.
create temp table running_jobs as
    select job_id, tenant_id, token, started_at, num_steps, (is_own)::int as own, is_long,
        row_number() over (partition by is_own, is_long order by n) - 1 as i, count(*) over (partition by is_own, is_long) as num
    from (select p.*, p.tenant_id = s.tenant_id as is_own from planted p, seed s where p.status <> 'queued') p;
create index on running_jobs (own, is_long, i);
analyze running_jobs;
create temp table steps as
    select w.at, r.job_id, r.tenant_id, r.token, w.at / 4 + 1 as step, r.num_steps,
        r.started_at + (w.at / 4) * interval '1 second' as recorded_at
    from generate_series(0, 1199999, 4) w (at) join running_jobs r on r.is_long
    union all
    select w.at, r.job_id, r.tenant_id, r.token, w.i / r.num + 1, r.num_steps, r.started_at + (w.i / r.num) * interval '5 seconds'
    from (select i as at, i / 4 * 3 + i %% 4 - 1 as i from generate_series(0, 1199999) i where i %% 4 > 0) w
    join (select distinct num from running_jobs where own = 1 and not is_long) c on true
    join running_jobs r on r.own = 1 and not r.is_long and r.i = w.i %% c.num
    union all
    select 1200000 + w.i, r.job_id, r.tenant_id, r.token, w.i / r.num + 1, r.num_steps,
        r.started_at + (w.i / r.num) * interval '5 seconds'
    from generate_series(0, 699999) w (i) join (select distinct num from running_jobs where own = 0) c on true
    join running_jobs r on r.own = 0 and r.i = w.i %% c.num;
insert into events (id, tenant_id, job_id, level, type, message, details, created_at)
    select uuidv7(), tenant_id, job_id, 'info', 'metrics',
        format('Step %%s/%%s: training loss=1.2345', step, num_steps),
        jsonb_build_object('step', step, 'total_steps', num_steps, 'train_loss', 1 + 1.0 / step,
            'train_mean_token_accuracy', 0.5, 'learning_rate', 0.0001, 'num_tokens', 512),
        recorded_at
    from steps order by at;
set session_replication_role = origin;  -- a trigger sums up every 32 steps
insert into metrics (job_id, step, tenant_id, lease_token, train_loss, train_accuracy, learning_rate, grad_norm, num_tokens,
    valid_loss, valid_accuracy, created_at)
    select job_id, step, tenant_id, token, 1 + 1.0 / step + random() / 10, 0.5, 0.0001, 1, 512,
        case when step %% 100 = 0 then 1.5 end, case when step %% 100 = 0 then 0.5 end, recorded_at
    from steps order by at;
set session_replication_role = replica;
insert into log_lines (id, tenant_id, job_id, attempt_number, level, name, details, created_at)
    select uuidv7(), tenant_id, job_id, 1, 'info', 'step.ended', '{"seconds": 0.5}', recorded_at
    from steps where at %% 5 = 0 order by at;

insert into audit_entries (tenant_id, actor, action, subject, before, after, created_at)
    select case when n %% 2 = 0 then s.tenant_id else o.tenant_id end, 'operator:ada:0', 'tenants.update', 'x',
        '{"weight": 1}', '{"weight": 2}', now() - (100001 - n) * interval '10 minutes'
    from generate_series(1, 100000) n cross join seed s join others o on o.i = n %% 199;
insert into api_keys (id, tenant_id, key_id, secret_hash, name, scopes, revoked_at)
    select uuidv7(), tenant_id, lpad(n::text, 16, '0'), sha256(n::text::bytea), 'key ' || n, array['read'],
        case when n > 50 then now() end from generate_series(1, 1000) n, seed;
delete from storage_totals;
insert into storage_totals (tenant_id, num_bytes)
    select tenant_id, sum(size_bytes) from (
        select tenant_id, size_bytes from files union all select tenant_id, size_bytes from adapters
        union all select tenant_id, size_bytes from checkpoints union all select tenant_id, size_bytes from resume_points
    ) stored group by tenant_id;
analyze;
