"""Every number that an operator or a tenant sets has bounds, in tables and in requests, and is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from alembic import command
from pydantic import ValidationError
from sqlalchemy import Connection, Double, Engine, Integer, text
from sqlalchemy.exc import IntegrityError

from core.db.base import Row
from core.db.session import service_transaction
from core.domain import bounds
from core.domain.bases import BaseModelEntry
from core.domain.bounds import Bounds
from core.domain.job_requests import JobRequest
from core.services.tenants import TenantChange
from core.settings import ApiSettings, ScheduleSettings, WorkerSettings
from tests.factories.tenants import Tenant
from tests.integration.histories import configure

SET_BY_PEOPLE = {
    "weight": bounds.WEIGHT,
    "usage": bounds.USAGE_SECONDS,
    "max_running": bounds.RUNNING_JOBS,
    "max_queued": bounds.QUEUED_JOBS,
    "max_storage_bytes": bounds.STORED_BYTES,
    "max_tokens_per_job": bounds.TRAINED_TOKENS,
    "max_gpu_seconds_per_month": bounds.GPU_SECONDS,
    "requests_per_minute": bounds.REQUESTS_PER_MINUTE,
}


def beyond(limits: Bounds) -> list[str]:
    step = 1 if limits.least == int(limits.least) and limits.greatest >= 1 else limits.least / 2
    return [str(limits.least - step), str(limits.greatest + max(1, limits.greatest * 1e-9))]


@pytest.mark.parametrize("column", sorted(SET_BY_PEOPLE))
def test_a_tenants_number_out_of_bounds_is_refused_by_the_table_whoever_writes_it(
    owner: Engine, tenant: Tenant, column: str
) -> None:
    is_whole = isinstance(Row.metadata.tables["tenants"].c[column].type, Integer)
    nonsense = [] if is_whole else ["'NaN'", "'Infinity'", "'-Infinity'", "1e-308 - 1"]
    for value in [*beyond(SET_BY_PEOPLE[column]), *nonsense]:
        number = f"cast({value} as numeric)::bigint" if is_whole else f"{value}::float8"
        statement = text(f"update tenants set {column} = {number} where id = :id")
        with (
            pytest.raises(IntegrityError, match=f"ck_tenants_{column}_bounded"),
            service_transaction(owner) as session,
        ):
            session.execute(statement, {"id": tenant.id})


def test_every_number_of_a_tenant_and_of_a_base_has_a_bound(owner: Engine) -> None:
    for table in ("tenants", "base_models"):
        columns = Row.metadata.tables[table].c
        numbers = {column.name for column in columns if isinstance(column.type, Integer | Double)}
        query = text("select conname from pg_constraint where conrelid = cast(:table as regclass) and contype = 'c'")
        with service_transaction(owner) as session:
            names = set(session.scalars(query, {"table": table}))
        assert {f"ck_{table}_{name}_bounded" for name in numbers} <= names


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"weight": 1e-308}, "weight"),
        ({"weight": 1e9}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"max_running": 10_001}, "max_running"),
        ({"max_queued": -1}, "max_queued"),
        ({"max_storage_bytes": 2**63}, "max_storage_bytes"),
        ({"max_gpu_seconds_per_month": float("inf")}, "max_gpu_seconds_per_month"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
    ],
)
def test_an_operators_number_is_refused_by_its_field(values: dict[str, float], field: str) -> None:
    assert_refused(TenantChange, values, field)


@pytest.mark.parametrize("field", ["max_seq_len", "max_rank", "slots", "max_tokens_per_step"])
@pytest.mark.parametrize("value", [0, 2**31])
def test_a_registrys_number_is_refused_by_its_field(field: str, value: int) -> None:
    good: dict[str, Any] = {
        "id": "a",
        "source": {"kind": "path", "location": "/"},
        "target_modules": ("q",),
        "max_seq_len": 64,
    }
    assert_refused(BaseModelEntry, good | {field: value}, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_epochs", 51),
        ("batch_size", 257),
        ("learning_rate", 1e-300),
        ("learning_rate", 1.1),
        ("learning_rate_multiplier", 1e-300),
        ("warmup_ratio", 1.1),
        ("weight_decay", 11),
        ("max_grad_norm", 1e-300),
        ("max_seq_len", 2**31),
        ("seed", 2**31),
        ("priority", 101),
        ("alpha", 1e-300),
        ("dropout", 0.999),
    ],
)
def test_a_jobs_number_is_refused_by_its_field(field: str, value: float) -> None:
    good = {"base_model_id": "a", "training_file_id": "00000000-0000-0000-0000-000000000000"}
    assert_refused(JobRequest, good | {field: value}, field)


SETTINGS = {
    "database_url": "postgresql://",
    "redis_url": "redis://cache",
    "s3_endpoint": "s3",
    "s3_access_key": "a",
    "s3_secret_key": "s",
}


@pytest.mark.parametrize("kind", [ApiSettings, ScheduleSettings, WorkerSettings])
def test_every_number_of_the_settings_has_bounds(kind: Any) -> None:
    schema = kind.model_json_schema()["properties"]
    numbers = {name: json.dumps(field) for name, field in schema.items() if '"type": "number"' in json.dumps(field)}
    numbers |= {name: json.dumps(field) for name, field in schema.items() if '"type": "integer"' in json.dumps(field)}
    assert numbers
    for name, field in numbers.items():
        assert "minimum" in field, name
        assert "maximum" in field, name
        assert_refused(kind, SETTINGS | {name: 1e300}, name)
        assert_refused(kind, SETTINGS | {name: float("nan")}, name)


def assert_refused(kind: Any, values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(values)
    assert {str(error["loc"][0]) for error in refused.value.errors()} == {field}


def test_numbers_from_before_the_bounds_are_moved_to_the_nearest_one(connection: Connection) -> None:
    config = configure(connection)
    command.upgrade(config, "0014")
    connection.execute(
        text("""
        insert into tenants (id, slug, name, weight, usage, usage_at, max_running, max_gpu_seconds_per_month) values
            (gen_random_uuid(), 'light', 'a', 1e-308, 'NaN', 'infinity', 9000000000, 'Infinity'),
            (gen_random_uuid(), 'sound', 'b', 2.5, 60, now(), 8, null)
        """)
    )
    command.upgrade(config, "0016")
    query = (
        "select weight, usage, isfinite(usage_at), max_running, max_gpu_seconds_per_month from tenants order by slug"
    )
    assert [tuple(row) for row in connection.execute(text(query))] == [
        (0.01, 1e12, True, 10_000, 1e9),
        (2.5, 60.0, True, 8, None),
    ]


def test_what_was_stored_waited_and_was_named_before_is_counted_and_reserved(connection: Connection) -> None:
    """Two jobs of a tenant whose ids end alike: the one that has succeeded keeps its digits."""
    config = configure(connection)
    command.upgrade(config, "0014")
    connection.execute(
        text("""
        insert into tenants (id, slug, name) values ('00000000-0000-0000-0000-000000000001', 'a', 'a');
        insert into base_models (id, source, dtype, quantizations, target_modules, max_seq_len, max_rank, slots,
            max_tokens_per_step) values ('b', '{}', 'float32', '{}', '{q}', 64, 64, 8, 64);
        insert into files (id, tenant_id, filename, purpose, size_bytes, sha256, object_key, num_examples, status,
            deleted_at, purged_at)
        select gen_random_uuid(), t.id, 'a', 'fine-tune', size, repeat('0', 64), 'k', 4, 'processed', deleted, purged
        from tenants t, (values (100, null::timestamptz, null::timestamptz), (20, now(), null), (3, now(), now()))
            f (size, deleted, purged);
        insert into jobs (id, tenant_id, base_model_id, pool, training_file_id, spec, total_steps, status, finished_at,
            fine_tuned_model)
        select j.id::uuid, f.tenant_id, 'b', 'b@none', f.id, '{}', 1, j.status, finished, name
        from (select * from files where size_bytes = 100) f, (values
            ('00000000-0000-0000-0000-0000aaaaaaaa', 'paused', null::timestamptz, null),
            ('10000000-0000-0000-0000-0000aaaaaaaa', 'succeeded', now(), 'ft:b:a::aaaaaaaa'),
            ('20000000-0000-0000-0000-0000bbbbbbbb', 'queued', null, null)) j (id, status, finished, name);
        insert into resume_points (id, tenant_id, job_id, lease_token, step, object_prefix, files)
        select gen_random_uuid(), tenant_id, id, 1, 1, 'p', '[{"size_bytes": 7}, {"size_bytes": 4000}]' from jobs
        where status = 'paused';
        insert into checkpoints (id, tenant_id, job_id, lease_token, step, model_name, object_prefix, files, metrics)
        select gen_random_uuid(), tenant_id, id, 1, 1, 'm', 'p', '[{"size_bytes": 500}]', '{}' from jobs
        where status = 'paused';
        """)
    )
    command.upgrade(config, "0016")
    assert connection.execute(text("select num_bytes from storage_totals")).scalars().all() == [4627]
    assert [tuple(row) for row in connection.execute(text("select num_queued, num_paused from queues"))] == [(1, 1)]
    digits = {row.status: row.name_digits for row in connection.execute(text("select status, name_digits from jobs"))}
    assert (digits["succeeded"], digits["queued"]) == ("aaaaaaaa", "bbbbbbbb")
    assert digits["paused"] != "aaaaaaaa"
    audited = connection.execute(text("select count(*) from audit_entries where action = 'checkpoint.changed'"))
    assert audited.scalar_one() == 0
