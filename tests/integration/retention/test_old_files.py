"""Old uploads and the rows of deleted files are deleted once no job and no object needs them."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import Engine, text

from core.db.session import service_transaction
from core.domain.ids import first_id_at, new_id
from core.services.retention import Kind
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.integration.retention.ageing import DAY, count, run_all, run_statements


def test_old_uploads_go_with_their_parts_once_their_objects_are_gone(
    schedule: Engine, owner: Engine, tenant: Tenant
) -> None:
    def add_upload(days: int, *, is_purged: bool, num_parts: int) -> uuid.UUID:
        at = dt.datetime.now(dt.UTC) - days * DAY
        upload_id = uuid.UUID(int=first_id_at(at).int + new_id().int % 2**64)
        values = {"id": upload_id, "tenant": tenant.id, "purged": at if is_purged else None, "num": num_parts}
        with service_transaction(owner) as session:
            session.execute(
                text("""
                insert into uploads (id, tenant_id, filename, purpose, mime_type, size_bytes, status, expires_at, purged_at)
                values (:id, :tenant, 'f', 'fine-tune', 'x', 1, 'cancelled', now(), :purged)"""),
                values,
            )
            session.execute(
                text("""
                insert into upload_parts (id, tenant_id, upload_id, object_key, size_bytes)
                select gen_random_uuid(), :tenant, :id, 'k', 1 from generate_series(1, :num)"""),
                values,
            )
        return upload_id

    add_upload(31, is_purged=True, num_parts=1500)
    unpurged = add_upload(31, is_purged=False, num_parts=1)
    young = add_upload(29, is_purged=True, num_parts=1)
    deleted = run_all(schedule, Kind.UPLOADS, days=30)
    assert [each["upload_parts"] for each in deleted] == [1000, 500, 0]
    with service_transaction(owner) as session:
        assert set(session.scalars(text("select id from uploads")).all()) == {unpurged, young}
    assert count(owner, "upload_parts", tenant) == 2


def test_the_row_of_a_deleted_file_goes_once_no_job_names_it(schedule: Engine, owner: Engine, tenant: Tenant) -> None:
    live = queue_job(owner, tenant).training_file_id
    named, old, young, unpurged, result = (queue_job(owner, tenant).training_file_id for _ in range(5))
    purge = "update files set deleted_at = now(), purged_at = now() - make_interval(days => {}) where id = '{}'"
    ages = {named: 31, old: 31, young: 29, result: 31}
    run_statements(owner, *(purge.format(days, file_id) for file_id, days in ages.items()))
    forget_name = f"update jobs set training_file_id = '{live}' where training_file_id = '{{}}'"
    run_statements(owner, *(forget_name.format(each) for each in (old, young, unpurged, result)))
    run_statements(owner, f"update jobs set result_file_id = '{result}' where training_file_id = '{named}'")

    def left() -> set[uuid.UUID]:
        with service_transaction(owner) as session:
            return set(session.scalars(text("select id from files")).all())

    assert [each.total() for each in run_all(schedule, Kind.FILES, days=30)] == [1]
    assert left() == {live, named, young, unpurged, result}
    run_statements(owner, "update jobs set result_file_id = null", forget_name.format(named))
    assert [each.total() for each in run_all(schedule, Kind.FILES, days=30)] == [2]
    assert left() == {live, young, unpurged}
