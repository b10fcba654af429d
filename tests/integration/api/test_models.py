"""Models by their names, their deletion, and checkpoints shared with another tenant."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import Engine, event, select, text

from core.db.models import Checkpoint, Job
from core.db.session import connect, service_transaction, tenant_transaction
from core.domain.ids import IdKind, format_id, new_id, parse_id
from core.services.adapters import list_adapters
from core.services.purges import find_purges, mark_purged
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.bases import BASE_MODEL
from tests.factories.files import GOOD, upload
from tests.factories.jobs import add_adapter, submit
from tests.factories.tenants import Tenant
from tests.waiting import PATIENCE_SECONDS


@pytest.fixture
def job_id(client: OpenAI) -> str:
    return str(submit(client, upload(client, GOOD).id).id)


def add_checkpoint(owner: Engine, servers: ServerAddresses, tenant: Tenant, job_id: str, *, step: int) -> str:
    row_id = parse_id(IdKind.JOB, job_id)
    name = f"ft:{BASE_MODEL}:{tenant.slug}::{job_id[-8:]}:ckpt-step-{step}"
    prefix = f"tenants/{tenant.id}/jobs/{row_id}/1/checkpoints/step-{step}/"
    stored = S3ObjectStore(servers.storage).put_bytes(prefix + "a.bin", b"weights", content_type="x/y")
    file = {"name": "a.bin", "size_bytes": stored.size_bytes, "sha256": stored.sha256}
    with service_transaction(owner) as session:
        session.add(
            Checkpoint(
                id=new_id(),
                tenant_id=tenant.id,
                job_id=row_id,
                lease_token=1,
                step=step,
                model_name=name,
                object_prefix=prefix,
                files=[file],
                metrics={"step": step},
            )
        )
    return name


def ask(api_url: str, tenant: Tenant, method: str, path: str, **options: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    return httpx.request(method, f"{api_url}/v1{path}", headers=headers, **options, timeout=PATIENCE_SECONDS)


def test_models_are_found_by_names_with_slashes_and_colons(
    client: OpenAI, owner: Engine, servers: ServerAddresses, tenant: Tenant, job_id: str
) -> None:
    name = add_adapter(owner, tenant, job_id)
    checkpoint = add_checkpoint(owner, servers, tenant, job_id, step=3)
    for model in (BASE_MODEL, name, checkpoint):
        assert client.models.retrieve(model).id == model
    assert {model.id for model in client.models.list()} == {BASE_MODEL, name}


OPENAI_FIELDS = ["id", "object", "created", "owned_by"]


def test_a_base_model_says_what_may_be_asked_of_it_after_openais_own_fields(
    api_url: str, tenant: Tenant, owner: Engine
) -> None:
    with service_transaction(owner) as session:
        session.execute(text("update base_models set license = 'apache-2.0' where id = :id"), {"id": BASE_MODEL})
    (listed,) = ask(api_url, tenant, "GET", "/models").json()["data"]
    assert list(listed)[:4] == OPENAI_FIELDS
    assert {name: value for name, value in listed.items() if name not in OPENAI_FIELDS} == {
        "quantizations": ["nf4"],
        "max_rank": 64,
        "max_seq_len": 256,
        "target_modules": ["q_proj", "v_proj"],
        "methods": ["supervised"],
        "license": "apache-2.0",
    }
    assert ask(api_url, tenant, "GET", f"/models/{BASE_MODEL}").json() == listed


def test_a_fine_tuned_model_names_its_base_and_rank_and_a_checkpoint_its_base(
    client: OpenAI, api_url: str, owner: Engine, servers: ServerAddresses, tenant: Tenant
) -> None:
    shape = {"rank": 24, "alpha": 48, "target_modules": ["v_proj"]}
    job_id = str(submit(client, upload(client, GOOD).id, extra_body={"adapter": shape}).id)
    name, checkpoint = add_adapter(owner, tenant, job_id), add_checkpoint(owner, servers, tenant, job_id, step=3)
    (listed,) = [each for each in ask(api_url, tenant, "GET", "/models").json()["data"] if each["id"] == name]
    assert list(listed)[:4] == OPENAI_FIELDS
    assert (listed["base_model"], listed["rank"]) == (BASE_MODEL, 24)
    assert ask(api_url, tenant, "GET", f"/models/{name}").json() == listed
    found = ask(api_url, tenant, "GET", f"/models/{checkpoint}").json()
    assert (list(found)[:4], found["base_model"]) == (OPENAI_FIELDS, BASE_MODEL)
    (adapter,) = ask(api_url, tenant, "GET", "/adapters").json()["data"]
    assert adapter["base_model"] == BASE_MODEL
    assert (adapter["rank"], adapter["alpha"], adapter["target_modules"]) == (24, 48.0, ["v_proj"])
    assert (adapter["quantization"], adapter["use_rslora"]) == (None, False)
    assert adapter["size_bytes"] == sum(file["size_bytes"] for file in adapter["files"])
    assert ask(api_url, tenant, "GET", f"/adapters/{adapter['id']}").json() == adapter


def test_an_adapter_whose_jobs_terms_cannot_be_read_is_listed_beside_the_others(
    client: OpenAI, api_url: str, owner: Engine, tenant: Tenant
) -> None:
    file_id = upload(client, GOOD).id
    jobs = [str(submit(client, file_id, suffix=f"s{n}").id) for n in range(2)]
    names = [add_adapter(owner, tenant, job_id) for job_id in jobs]
    with service_transaction(owner) as session:
        session.execute(text("update jobs set spec = '{}' where id = :id"), {"id": parse_id(IdKind.JOB, jobs[0])})
    listed = ask(api_url, tenant, "GET", "/adapters").json()["data"]
    assert [(each["name"], each["rank"]) for each in listed] == [(names[1], 16), (names[0], 0)]
    assert {model.id for model in client.models.list()} == {BASE_MODEL, *names}


def test_a_list_of_adapters_is_one_statement(client: OpenAI, api: Engine, owner: Engine, tenant: Tenant) -> None:
    file_id = upload(client, GOOD).id
    names = [add_adapter(owner, tenant, str(submit(client, file_id, suffix=f"s{n}").id)) for n in range(3)]
    statements: list[str] = []

    def note(*told: Any) -> None:
        statements.append(told[2])

    with tenant_transaction(api, tenant.id) as session:
        event.listen(api, "before_cursor_execute", note)
        page = list_adapters(session, tenant.id, after=None, limit=2)
        assert [trained.config["rank"] for trained in page.items] == [16, 16]
        event.remove(api, "before_cursor_execute", note)
    assert ([trained.row.name for trained in page.items], page.has_more) == (names[:0:-1], True)
    assert len([each for each in statements if "adapters" in each]) == len(statements) == 1


def test_a_deleted_model_is_gone_with_its_objects_and_its_job_stays(
    client: OpenAI, owner: Engine, servers: ServerAddresses, tenant: Tenant, job_id: str, database: Database
) -> None:
    checkpoint, other = (add_checkpoint(owner, servers, tenant, job_id, step=step) for step in (1, 2))
    name = add_adapter(owner, tenant, job_id)
    for model in (name, checkpoint):
        deleted = client.models.delete(model)
        assert (deleted.id, deleted.deleted, deleted.object) == (model, True, "model")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(model)
        with pytest.raises(openai.NotFoundError):
            client.models.delete(model)
    assert client.fine_tuning.jobs.retrieve(job_id).fine_tuned_model == name
    (left,) = client.fine_tuning.jobs.checkpoints.list(job_id).data
    assert left.fine_tuned_model_checkpoint == other
    schedule, store = connect(database.schedule_url), S3ObjectStore(servers.storage)
    with service_transaction(schedule) as session:
        due = [purge for purge in find_purges(session) if purge.location.startswith(f"tenants/{tenant.id}/")]
        assert sum(store.delete_prefix(purge.location) for purge in due) == 1
        for purge in due:
            mark_purged(session, purge)
    with service_transaction(schedule) as session:
        assert not [purge for purge in find_purges(session) if purge.location.startswith(f"tenants/{tenant.id}/")]
    schedule.dispose()
    assert len(list(store.list_keys(f"tenants/{tenant.id}/jobs/"))) == 1


def test_training_on_from_what_was_trained_is_refused_by_each_of_its_names_and_another_tenants_is_unknown(
    client: OpenAI,
    other_client: OpenAI,
    api_url: str,
    owner: Engine,
    servers: ServerAddresses,
    tenant: Tenant,
    other_tenant: Tenant,
    job_id: str,
) -> None:
    checkpoint = add_checkpoint(owner, servers, tenant, job_id, step=1)
    add_adapter(owner, tenant, job_id)
    (adapter,) = ask(api_url, tenant, "GET", "/adapters").json()["data"]
    file_id, other_file_id = (upload(each, GOOD).id for each in (client, other_client))
    for model in (checkpoint, adapter["id"], adapter["name"]):
        with pytest.raises(openai.BadRequestError, match=f"its base, '{BASE_MODEL}'") as refused:
            submit(client, file_id, model=model)
        assert (refused.value.code, refused.value.param) == ("warm_start_unsupported", "model")
        for who, file, name in ((other_client, other_file_id, model), (client, file_id, model[:-1] + "x")):
            with pytest.raises(openai.NotFoundError) as unknown:
                submit(who, file, model=name)
            assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    client.fine_tuning.checkpoints.permissions.create(checkpoint, project_ids=[other_tenant.slug])
    with pytest.raises(openai.BadRequestError, match="not supported yet"):
        submit(other_client, other_file_id, model=checkpoint)


def test_a_base_model_is_not_the_tenants_to_delete(client: OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(BASE_MODEL)
    with pytest.raises(openai.NotFoundError):
        client.models.delete("nobody/nothing")


def test_a_checkpoint_of_an_unfinished_job_stays(
    client: OpenAI, owner: Engine, servers: ServerAddresses, tenant: Tenant, job_id: str
) -> None:
    name = add_checkpoint(owner, servers, tenant, job_id, step=1)
    with pytest.raises(openai.ConflictError):
        client.models.delete(name)


@pytest.mark.parametrize("spelling", ["id", "slug"])
def test_a_shared_checkpoint_can_be_read_and_downloaded_and_nothing_else(
    client: OpenAI,
    other_client: OpenAI,
    api_url: str,
    owner: Engine,
    servers: ServerAddresses,
    tenant: Tenant,
    other_tenant: Tenant,
    job_id: str,
    spelling: str,
) -> None:
    shared, private = (add_checkpoint(owner, servers, tenant, job_id, step=step) for step in (1, 2))
    project = other_tenant.slug if spelling == "slug" else format_id(IdKind.TENANT, other_tenant.id)
    (permission,) = client.fine_tuning.checkpoints.permissions.create(shared, project_ids=[project]).data
    assert (permission.object, permission.project_id) == ("checkpoint.permission", project)
    assert other_client.models.retrieve(shared).owned_by == format_id(IdKind.TENANT, tenant.id)
    read = ask(api_url, other_tenant, "GET", f"/fine_tuning/checkpoints/{shared}").json()
    assert read["fine_tuned_model_checkpoint"] == shared
    download = ask(api_url, other_tenant, "GET", f"/fine_tuning/checkpoints/{shared}/download").json()
    assert httpx.get(download["files"][0]["url"], timeout=PATIENCE_SECONDS).content == b"weights"
    job = f"/fine_tuning/jobs/{job_id}"
    for method, path in (
        ("GET", f"/models/{private}"),
        ("GET", f"/fine_tuning/checkpoints/{private}/download"),
        ("GET", f"/fine_tuning/checkpoints/{shared}/permissions"),
        ("DELETE", f"/fine_tuning/checkpoints/{shared}/permissions/{permission.id}"),
        ("DELETE", f"/models/{shared}"),
        ("GET", job),
        ("GET", f"{job}/checkpoints"),
    ):
        assert ask(api_url, other_tenant, method, path).status_code == 404, path
    body = {"project_ids": [tenant.slug]}
    assert (
        ask(api_url, other_tenant, "POST", f"/fine_tuning/checkpoints/{shared}/permissions", json=body).status_code
        == 404
    )
    revoked = client.fine_tuning.checkpoints.permissions.delete(permission.id, fine_tuned_model_checkpoint=shared)
    assert (revoked.deleted, revoked.id) == (True, permission.id)
    with pytest.raises(openai.NotFoundError):
        other_client.models.retrieve(shared)


def test_the_database_itself_shows_a_shared_checkpoint_and_only_that(
    client: OpenAI,
    api: Engine,
    owner: Engine,
    servers: ServerAddresses,
    tenant: Tenant,
    other_tenant: Tenant,
    job_id: str,
) -> None:
    shared, _private = (add_checkpoint(owner, servers, tenant, job_id, step=step) for step in (1, 2))
    client.fine_tuning.checkpoints.permissions.create(shared, project_ids=[other_tenant.slug])
    with tenant_transaction(api, other_tenant.id) as session:
        assert session.scalars(select(Checkpoint.model_name)).all() == [shared]
        assert session.scalars(select(Job.id)).all() == []
        changed = session.execute(text("update checkpoints set deleted_at = now()"))
        assert changed.rowcount == 0  # type: ignore[attr-defined]
        assert session.execute(text("delete from checkpoint_permissions")).rowcount == 0  # type: ignore[attr-defined]
    with service_transaction(api) as session:
        assert session.scalars(select(Checkpoint.model_name)).all() == []


def test_links_to_what_was_trained_live_no_longer_than_the_key_that_asked(
    api_url: str, owner: Engine, servers: ServerAddresses, tenant: Tenant, job_id: str
) -> None:
    checkpoint = add_checkpoint(owner, servers, tenant, job_id, step=1)
    add_adapter(owner, tenant, job_id)
    (adapter,) = ask(api_url, tenant, "GET", "/adapters").json()["data"]
    body = {"name": "brief", "expires_after": {"anchor": "created_at", "seconds": 100}}
    made = ask(api_url, tenant, "POST", "/api_keys", json=body).json()
    for path in (f"/adapters/{adapter['id']}/download", f"/fine_tuning/checkpoints/{checkpoint}/download"):
        link = ask(api_url, replace(tenant, api_key=made["value"]), "GET", path).json()
        assert link["expires_at"] <= made["expires_at"]
        for file in link["files"]:
            assert int(httpx.URL(file["url"]).params["X-Amz-Expires"]) <= 100


def test_a_permission_for_nobody_tells_nothing(
    client: OpenAI, owner: Engine, servers: ServerAddresses, tenant: Tenant, job_id: str
) -> None:
    name = add_checkpoint(owner, servers, tenant, job_id, step=1)
    unknown = [f"no-{uuid.uuid4().hex[:8]}", format_id(IdKind.TENANT, new_id())]
    made = client.fine_tuning.checkpoints.permissions.create(name, project_ids=unknown)
    assert [each.project_id for each in made] == unknown


def test_permissions_are_listed_in_pages_and_made_once(
    client: OpenAI, owner: Engine, servers: ServerAddresses, tenant: Tenant, job_id: str
) -> None:
    name = add_checkpoint(owner, servers, tenant, job_id, step=1)
    permissions = client.fine_tuning.checkpoints.permissions
    made = [permissions.create(name, project_ids=[f"p{number}"]).data[0].id for number in range(5)]
    assert permissions.create(name, project_ids=["p2", "p2"]).data[0].id == made[2]
    assert [each.id for each in permissions.list(name, limit=2)] == made[::-1]
    assert [each.id for each in permissions.list(name, limit=2, order="ascending")] == made
    assert [each.id for each in permissions.list(name, project_id="p3")] == [made[3]]


@pytest.mark.parametrize("call", ["validate", "run"])
def test_graders_are_refused_once_and_clearly(api_url: str, tenant: Tenant, call: str) -> None:
    answer = ask(api_url, tenant, "POST", f"/fine_tuning/alpha/graders/{call}", json={"grader": {}})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (501, "false")
    assert answer.json()["error"]["code"] == "not_supported"
