"""Deleted jobs are gone: the tests search every column of every table, and every object, for their words."""

from __future__ import annotations

from collections import Counter

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import ProgrammingError

from core.db.models import Job
from core.db.session import service_transaction
from core.domain.ids import IdKind, parse_id
from core.services.erasure import BEGINNING, Place, erase_some_jobs
from core.services.job_rows import BATCH_ROWS
from schedule.purger import purge
from tests.factories.tenants import Tenant
from tests.integration.erasure.worlds import World, make_word, run_statement, start, submit, train, upload_dataset


@pytest.mark.parametrize("is_success", [True, False])
def test_of_a_job_that_its_tenant_deletes_no_word_is_left_anywhere_and_its_bill_stays(
    world: World, tenant: Tenant, *, is_success: bool
) -> None:
    doomed, kept, dataset = make_word(), make_word(), make_word()
    file_id = upload_dataset(world, tenant, dataset)
    job_id, _ = train(world, tenant, file_id, doomed, is_success=is_success)
    train(world, tenant, file_id, kept, is_success=is_success)
    world.run_duties()
    everywhere, used, broken = world.find(kept), world.used(), world.find_broken()
    assert {"jobs", "events", "log_lines", "idempotency_keys", "audit_entries", "checkpoints"} <= set(everywhere)
    assert ({"adapters", "files", "checkpoint_permissions"} <= set(everywhere)) == is_success
    assert world.find(doomed) == everywhere
    of_dataset = world.find(dataset)
    answer = world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}")
    assert answer.json() == {"id": job_id, "object": "fine_tuning.job", "deleted": True}
    world.run_duties()
    assert world.find(doomed) == Counter()
    assert world.find(kept) == everywhere
    assert world.find(dataset) == of_dataset
    assert world.find(parse_id(IdKind.JOB, job_id).hex) == Counter()
    assert world.used() == used
    assert world.find_broken() == broken == []
    with service_transaction(world.owner) as session:
        actions = text("select action from audit_entries where subject = :id order by number")
        assert session.scalars(actions, {"id": str(parse_id(IdKind.JOB, job_id))}).all() == [
            "job.created",
            "job.deleted",
        ]


def test_a_job_that_waits_for_late_writes_has_no_word_left_in_any_table_and_is_seen_by_nobody(
    world: World, tenant: Tenant
) -> None:
    word = make_word()
    job_id, lease = train(world, tenant, upload_dataset(world, tenant, make_word()), word)
    with world.client(tenant) as client:
        model = client.fine_tuning.jobs.retrieve(job_id).fine_tuned_model
    assert world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}").status_code == 200
    for path in ("", "/events", "/checkpoints", "/logs", "/metrics", "/stream", "/explain"):
        assert world.ask(tenant, "GET", f"/v1/fine_tuning/jobs/{job_id}{path}").status_code == 404, path
    assert world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}").status_code == 404
    for path in ("/v1/fine_tuning/jobs", "/v1/adapters"):
        assert world.ask(tenant, "GET", path).json()["data"] == [], path
    assert world.ask(tenant, "GET", f"/v1/models/{model}").status_code == 404
    world.erase()
    assert set(world.find(word)) == {"keys", "contents", "resume_points"}
    purge(world.schedule, world.store, may_go_on=lambda _: True)
    world.erase()
    assert world.find(word) == Counter(keys=1, contents=1), "what no row names waits for the sweep, and the row with it"
    with service_transaction(world.owner) as session:
        assert session.scalars(select(Job.id)).all() == [lease.job_id]
    assert world.find_broken() == []


def test_only_a_job_that_has_ended_can_be_deleted_and_only_by_its_tenant(
    world: World, tenant: Tenant, other_tenant: Tenant
) -> None:
    job_id = submit(world, tenant, upload_dataset(world, tenant, make_word()), make_word())
    for status in ("queued", "running"):
        answer = world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_not_ended"), status
        assert "Cancel it first" in answer.json()["error"]["message"]
        if status == "queued":
            start(world, job_id)
    assert world.ask(tenant, "POST", f"/v1/fine_tuning/jobs/{job_id}/cancel").status_code == 200
    assert world.ask(other_tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}").status_code == 404
    assert world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}").status_code == 200


def test_the_key_of_a_deleted_job_and_its_words_stand_for_a_new_job(world: World, tenant: Tenant) -> None:
    word = make_word()
    file_id = upload_dataset(world, tenant, word)
    job_id, _ = train(world, tenant, file_id, word, is_success=False)
    world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}")
    assert submit(world, tenant, file_id, word) != job_id


def test_a_long_history_goes_a_thousand_rows_at_a_time_however_often_it_is_interrupted(
    world: World, tenant: Tenant
) -> None:
    word = make_word()
    job_id, lease = train(world, tenant, upload_dataset(world, tenant, make_word()), word)
    add = f"""
        insert into events (id, tenant_id, job_id, level, type, message)
        select gen_random_uuid(), tenant_id, id, 'info', 'message', '{word}' from jobs, generate_series(1, 2500)
    """
    run_statement(world.owner, add, lease)
    world.ask(tenant, "DELETE", f"/v1/fine_tuning/jobs/{job_id}")
    sizes = []
    place: Place | None = BEGINNING
    while place is not None:
        with service_transaction(world.schedule) as session:
            num_rows, place = erase_some_jobs(session, after=BEGINNING)  # as after an interruption
        sizes.append(num_rows.total())
    assert sizes[:2] == [BATCH_ROWS, BATCH_ROWS]
    assert max(sizes) <= BATCH_ROWS + 10
    world.run_duties()
    assert world.find(word) == Counter()


def test_the_schedule_can_delete_and_blank_nothing_of_what_nobody_has_deleted(world: World, tenant: Tenant) -> None:
    word = make_word()
    _, lease = train(world, tenant, upload_dataset(world, tenant, make_word()), word)
    world.run_duties()
    everywhere = world.find(word)
    with service_transaction(world.schedule) as session:
        for table in ("events", "log_lines", "checkpoint_permissions", "api_keys", "queues", "storage_totals", "files"):
            session.execute(text(f"delete from {table}"))
        session.execute(text("select blank_audit_entries_of_job(:id)"), {"id": lease.job_id})
        session.execute(text("select blank_audit_entries_of_tenant(:id, 1000)"), {"id": tenant.id})
    assert world.find(word) == everywhere
    with pytest.raises(ProgrammingError, match="permission denied"), service_transaction(world.worker) as session:
        session.execute(text("select blank_audit_entries_of_job(:id)"), {"id": lease.job_id})
