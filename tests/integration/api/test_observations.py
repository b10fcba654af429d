"""A job's metrics, thinned out without losing a spike, and its log lines, which only its tenant can read."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError

from core.db.session import connect, service_transaction, tenant_transaction
from core.domain.ids import IdKind, format_id
from core.domain.leases import Lease
from core.services.logs import record_log_line
from core.services.observations import StepRange, read_observations, record_evaluation
from core.services.resume_points import begin_steps
from tests.databases import Database
from tests.factories.jobs import record_step, start_job
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction
from tests.waiting import PATIENCE_SECONDS

PREPARED = """
select custom_plans, generic_plans from pg_prepared_statements where starts_with(ltrim(statement, e'\n'), 'with spans')
"""


def get(api_url: str, tenant: Tenant, lease: Lease, what: str, **params: Any) -> httpx.Response:
    url = f"{api_url}/v1/fine_tuning/jobs/{format_id(IdKind.JOB, lease.job_id)}/{what}"
    return httpx.get(
        url,
        params=params,
        headers={"authorization": f"Bearer {tenant.api_key}"},
        trust_env=False,
        timeout=PATIENCE_SECONDS,
    )


def add_steps(
    owner: Engine,
    lease: Lease,
    losses: str,
    *,
    last: int,
    valid_loss: str = "case when s % 1000 = 0 then 7.5 end",
) -> None:
    statement = f"""
        insert into metrics (job_id, tenant_id, step, lease_token, train_loss, train_accuracy, learning_rate, grad_norm,
            num_tokens, valid_loss)
        select :job, :tenant, s, :token, {losses}, 0.5, 0.1, 1, 10, {valid_loss}
        from generate_series(1, :last) s
    """
    with service_transaction(owner) as session:
        values = {"job": lease.job_id, "tenant": lease.tenant_id, "token": lease.token, "last": last}
        session.execute(text(statement), values)


def test_a_spike_of_one_step_in_ten_thousand_survives_the_thinning(api_url: str, owner: Engine, tenant: Tenant) -> None:
    lease = start_job(owner, tenant)
    add_steps(owner, lease, "case s when 4711 then 99 when 1234 then -5 else 1 + 1.0 / s end", last=10_000)
    series = get(api_url, tenant, lease, "metrics", points=60).json()
    steps = [row["step"] for row in series["data"]]
    assert (series["num_steps"], series["is_thinned"]) == (10_000, True)
    assert 20 <= len(steps) <= 60
    assert steps == sorted(set(steps))
    assert {1, 4711, 1234, 10_000} <= set(steps)
    assert {row["full_valid_loss"] for row in series["data"]} == {None, 7.5}
    for low in range(1, 10_001, 500):  # 20 equal stretches, none of them empty
        assert any(low <= step < low + 500 for step in steps)


@pytest.mark.parametrize("points", [3, 4, 60, 100])
def test_no_more_points_are_answered_than_were_asked_for(
    api_url: str, owner: Engine, tenant: Tenant, points: int
) -> None:
    lease = start_job(owner, tenant)
    # The least loss, an evaluation and the greatest loss follow one another: each stretch has all three, apart.
    add_steps(owner, lease, "s % 3", last=5000, valid_loss="case when s % 3 = 1 then 7.5 end")
    steps = [row["step"] for row in get(api_url, tenant, lease, "metrics", points=points).json()["data"]]
    assert len(steps) == points // 3 * 3


def read(owner: Engine, lease: Lease, steps: StepRange, points: int) -> tuple[list[int], int]:
    with any_role_transaction(owner) as session:
        series = read_observations(session, lease.tenant_id, job_id=lease.job_id, steps=steps, points=points)
        return [row.step for row in series.rows], series.num_steps


def test_what_is_summed_up_says_the_same_as_the_steps_themselves(owner: Engine, tenant: Tenant) -> None:
    lease = start_job(owner, tenant)
    skipped = "s % 500 = 7 or s in (64, 3200)"  # two of them would have ended a block
    with service_transaction(owner) as session:
        session.execute(
            text(f"""
            insert into metrics (job_id, tenant_id, step, lease_token, train_loss, train_accuracy, learning_rate,
                grad_norm, num_tokens, valid_loss)
            select :job, :tenant, s, :token, abs(hashint8(s)) % 97, 0.5, 0.1, 1, 10, case when s % 70 = 0 then 7.5 end
            from generate_series(1, 5000) s where not ({skipped}) order by s
            """),
            {"job": lease.job_id, "tenant": lease.tenant_id, "token": lease.token},
        )
    asked = [
        (StepRange(first, last), points)
        for first, last in ((1, 2**40), (1, 4000), (33, 64), (40, 4321), (65, 4999), (4000, 4100), (4970, 5000))
        for points in (3, 60, 600)
    ]
    summed_up = [read(owner, lease, *each) for each in asked]
    with service_transaction(owner) as session:
        num_blocks = session.scalar(text("select count(*) from metric_blocks where job_id = :id"), {"id": lease.job_id})
        session.execute(text("delete from metric_blocks where job_id = :id"), {"id": lease.job_id})
    assert num_blocks == 5000 // 32 - 2
    assert [read(owner, lease, *each) for each in asked] == summed_up


def test_an_evaluation_is_charted_whether_its_block_ends_before_or_after_it(
    owner: Engine, worker: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    evaluated = (10, 64, 90)
    for step in range(1, 97):
        record_step(worker, lease, step, loss=1.0)
        if step in evaluated:
            with service_transaction(worker) as session:
                record_evaluation(session, lease, step=step, loss=7.5, token_accuracy=0.5)
    assert read(owner, lease, StepRange(1, 96), 9) == ([10, 32, 64, 90, 96], 96)


def test_few_steps_are_all_there_and_a_range_is_kept(api_url: str, owner: Engine, tenant: Tenant) -> None:
    lease = start_job(owner, tenant)
    for step in range(1, 13):
        record_step(owner, lease, step, loss=step / 10)
    series = get(api_url, tenant, lease, "metrics", from_step=3, to_step=5).json()
    assert [(row["step"], row["train_loss"]) for row in series["data"]] == [(3, 0.3), (4, 0.4), (5, 0.5)]
    assert not series["is_thinned"]
    assert get(api_url, tenant, lease, "metrics", from_step=100).json()["data"] == []


@pytest.mark.parametrize(
    "params",
    [{"points": 2}, {"points": 3001}, {"from_step": 0}, {"to_step": -1}, {"from_step": 5, "to_step": 4}, {"to_step": 2**70}, {"points": "x"}],
)  # fmt: skip
def test_bounds_of_metrics_are_strict(api_url: str, owner: Engine, tenant: Tenant, params: dict[str, Any]) -> None:
    assert get(api_url, tenant, start_job(owner, tenant), "metrics", **params).status_code == 400


def log(worker: Engine, lease: Lease, name: str, **details: Any) -> None:
    with service_transaction(worker) as session:
        record_log_line(session, lease.token, name=name, level="info", details=details)


def test_a_log_holds_the_lines_of_its_job_in_order_and_no_other_tenants(
    api_url: str, owner: Engine, worker: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    own, others = start_job(owner, tenant), start_job(owner, other_tenant)
    for number in range(5):
        log(worker, own, "dataset.tokenized", number=number)
        log(worker, others, "theirs")
    first = get(api_url, tenant, own, "logs", limit=3).json()
    rest = get(api_url, tenant, own, "logs", limit=3, after=first["last_id"]).json()
    assert [line["data"]["number"] for line in first["data"] + rest["data"]] == [0, 1, 2, 3, 4]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert {(line["name"], line["attempt"], line["level"]) for line in first["data"]} == {
        ("dataset.tokenized", 1, "info")
    }
    assert get(api_url, tenant, own, "logs", attempt=2).json()["data"] == []
    for what in ("logs", "metrics"):
        assert get(api_url, tenant, others, what).status_code == 404
    theirs = get(api_url, other_tenant, others, "logs").json()["first_id"]
    assert get(api_url, tenant, own, "logs", after=theirs).status_code == 404


def test_a_line_of_no_attempt_is_not_kept_and_a_huge_one_is_refused(
    api_url: str, owner: Engine, worker: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    log(worker, Lease(lease.job_id, lease.tenant_id, 10**12), "of.nobody")
    assert get(api_url, tenant, lease, "logs").json()["data"] == []
    with pytest.raises(IntegrityError, match="details_size"):
        log(worker, lease, "huge", words="x" * 5000)


def test_a_chart_is_planned_for_its_own_range_where_postgresql_would_plan_once_for_all(
    database: Database, owner: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    add_steps(owner, lease, "1.0 / s", last=1000)
    api = connect(database.api_url, pool_size=1)
    for _ in range(20):  # on one connection, which prepares a statement after five
        with tenant_transaction(api, tenant.id) as session:
            session.execute(text("set local plan_cache_mode = force_generic_plan"))
            read_observations(session, tenant.id, job_id=lease.job_id, steps=StepRange(1, 1000), points=60)
            told = session.execute(text(PREPARED)).all()
    api.dispose()
    ((num_custom, num_generic),) = told
    assert num_custom > 10
    assert num_generic == 0


def test_a_chart_shows_what_was_trained_last_after_a_job_went_back(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    for step in range(1, 65):
        record_step(worker, lease, step, loss=9.0 if step == 40 else 1.0)
    with service_transaction(worker) as session:
        begin_steps(session, lease, step=32, total_steps=64)
    for step in range(33, 65):
        record_step(worker, lease, step, loss=5.0 if step == 50 else 1.0)
    with any_role_transaction(worker) as session:
        series = read_observations(session, tenant.id, job_id=lease.job_id, steps=StepRange(1, 64), points=6)
    assert series.num_steps == 64
    assert [(row.step, row.train_loss) for row in series.rows if row.train_loss > 1] == [(50, 5.0)]
