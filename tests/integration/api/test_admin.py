"""The operators' routes: tenants, keys, base models and the audit log, for operators only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

from core.db.session import connect, operator_transaction, service_transaction, tenant_transaction
from core.domain.bases import BaseState
from core.services.base_models import record_state
from core.services.operators import issue_operator_key, revoke_operator_key
from tests.databases import Database
from tests.factories.bases import BASE_MODEL
from tests.factories.tenants import Tenant
from tests.integration.api.clients import good, http
from tests.routes import all_routes, verbs_of

GOOD = b'{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}'


@pytest.fixture
def operator_key(owner: Engine) -> str:
    with operator_transaction(owner, actor="test") as session:
        return str(issue_operator_key(session, name="olga"))


@pytest.fixture
def read_only_key(owner: Engine) -> str:
    with operator_transaction(owner, actor="test") as session:
        return str(issue_operator_key(session, name="rita", is_read_only=True))


@pytest.fixture
def admin(api_url: str, operator_key: str) -> Iterator[httpx.Client]:
    with http(api_url, operator_key) as client:
        yield client


def audit_of(admin: httpx.Client, tenant: Tenant) -> list[dict[str, Any]]:
    return list(good(admin.get("/admin/audit", params={"tenant": tenant.slug}))["data"])


def calls_of_operators(tenant: Tenant) -> list[tuple[str, str]]:
    """Return the method and the URL of every route of /admin, about this tenant where it is about one."""
    filled = {
        "{slug}": tenant.slug,
        "{key_id}": f"key_{tenant.key_id}",
        "{base_model_id:path}": BASE_MODEL,
        "{pool:path}": f"{BASE_MODEL}@none",
    }
    calls = []
    for route in all_routes():
        if route.path.startswith("/admin"):
            path = re.sub(r"{[^}]+}", lambda part: filled[part[0]], route.path)
            calls += [(verb, path) for verb in verbs_of(route)]
    assert len(calls) >= 15
    return calls


@pytest.mark.parametrize("who", ["nobody", "tenant"])
def test_to_everybody_else_the_operators_surface_is_an_unknown_url(api_url: str, tenant: Tenant, who: str) -> None:
    with http(api_url, tenant.api_key if who == "tenant" else "") as client:
        unknown = client.get("/admin/nothing/at/all")
        for verb, path in calls_of_operators(tenant):
            answer = client.request(verb, path, json={"slug": "x"})
            assert answer.status_code == 404, (verb, path)
            told = answer.json()["error"]
            assert told == unknown.json()["error"] | {"message": f"Not Found: {verb} {path}"}


@pytest.mark.parametrize("body", [b'{"slug": "by-rita"}', b'{"nonsense": 1}', b"{"])
def test_a_read_only_key_changes_nothing_whatever_it_sends(
    api_url: str, owner: Engine, tenant: Tenant, read_only_key: str, body: bytes
) -> None:
    changes = [call for call in calls_of_operators(tenant) if call[0] != "GET"]
    assert {verb for verb, _ in changes} >= {"POST", "DELETE"}
    count = text("select count(*) from audit_entries")
    with service_transaction(owner) as session:
        before = session.scalar(count)
    with http(api_url, read_only_key) as client:
        for verb, path in changes:
            answer = client.request(verb, path, content=body, headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["error"]) == (
                403,
                {
                    "message": f"This operator key may only read. For {verb}, use a key that was made without --read-only.",
                    "type": "permission_error",
                    "param": None,
                    "code": "read_only_key",
                },
            ), (verb, path)
    with service_transaction(owner) as session:
        assert session.scalar(count) == before


def test_a_read_only_key_reads_what_every_operator_reads(
    api_url: str, admin: httpx.Client, tenant: Tenant, read_only_key: str
) -> None:
    reads = [path for verb, path in calls_of_operators(tenant) if verb == "GET"]
    assert len(reads) >= 9
    with http(api_url, read_only_key) as client:
        for path in reads:
            assert set(good(client.get(path))) == set(good(admin.get(path))), path


def test_a_read_only_key_that_was_revoked_opens_nothing(api_url: str, owner: Engine, read_only_key: str) -> None:
    with operator_transaction(owner, actor="test") as session:
        revoke_operator_key(session, read_only_key.split("_")[2])
    with http(api_url, read_only_key) as client:
        assert client.get("/admin/tenants").status_code == 401
        assert client.post("/admin/tenants", json={"slug": "by-rita"}).status_code == 401


def test_the_audit_log_says_that_an_operators_key_was_made_to_read_only(
    admin: httpx.Client, operator_key: str, read_only_key: str
) -> None:
    made = {
        entry["subject"]: entry["after"]["is_read_only"]
        for entry in good(admin.get("/admin/audit"))["data"]
        if entry["action"] == "operator_key.created"
    }
    assert (made[operator_key.split("_")[2]], made[read_only_key.split("_")[2]]) == (False, True)


def test_no_runtime_role_makes_a_read_only_key_one_that_may_do_more(api: Engine, read_only_key: str) -> None:
    with (
        pytest.raises(ProgrammingError, match="permission denied"),
        operator_transaction(api, actor="x") as session,
    ):
        session.execute(
            text("update operator_keys set is_read_only = false where key_id = :id"),
            {"id": read_only_key.split("_")[2]},
        )


def test_an_operators_key_that_has_expired_opens_nothing(api_url: str, owner: Engine) -> None:
    with operator_transaction(owner, actor="test") as session:
        key = str(issue_operator_key(session, name="brief", lifetime=timedelta(hours=1)))
    with http(api_url, key) as client:
        good(client.get("/admin/tenants"))
        with service_transaction(owner) as session:
            session.execute(text("update operator_keys set expires_at = now() where name = 'brief'"))
        assert client.get("/admin/tenants").status_code == 401


def test_an_operators_key_opens_nothing_of_a_tenants(admin: httpx.Client) -> None:
    answer = admin.get("/v1/files")
    assert answer.status_code == 401
    assert answer.json()["error"]["message"].startswith("This is an operator's key: it opens /admin only.")


def test_only_what_has_the_form_of_an_operators_key_is_called_one(api_url: str, operator_key: str) -> None:
    with http(api_url, operator_key[:-1]) as client:
        answer = client.get("/v1/files")
    assert answer.status_code == 401
    assert answer.json()["error"] | {"code": "invalid_api_key"} == answer.json()["error"]
    assert "form or checksum" in answer.json()["error"]["message"]


def test_a_revoked_operator_key_opens_nothing(api_url: str, owner: Engine, operator_key: str) -> None:
    with http(api_url, operator_key) as client:
        good(client.get("/admin/tenants"))
        with operator_transaction(owner, actor="test") as session:
            revoke_operator_key(session, operator_key.split("_")[2])
        assert client.get("/admin/tenants").status_code == 401


def test_an_operator_makes_a_tenant_that_can_work_at_once(api_url: str, admin: httpx.Client) -> None:
    made = good(admin.post("/admin/tenants", json={"slug": "initech"}))
    assert made["is_disabled"] is False
    key = good(admin.post("/admin/tenants/initech/api_keys", json={"name": "first", "scopes": ["read"]}))
    with http(api_url, key["value"]) as client:
        assert [model["id"] for model in good(client.get("/v1/models"))["data"]] == [BASE_MODEL]
    again = admin.post("/admin/tenants", json={"slug": "initech"})
    assert (again.status_code, again.json()["error"]["code"]) == (400, "tenant_exists")
    assert admin.post("/admin/tenants", json={"slug": "No Slug"}).status_code == 400


def test_what_is_set_of_a_tenant_is_kept_and_the_rest_stays(admin: httpx.Client, tenant: Tenant) -> None:
    path = f"/admin/tenants/{tenant.slug}"
    before = good(admin.get(path))
    after = good(admin.post(path, json={"weight": 2.5, "max_storage_bytes": 1000}))
    assert after == before | {"weight": 2.5, "max_storage_bytes": 1000}
    assert good(admin.post(path, json={"max_storage_bytes": None}))["max_storage_bytes"] is None
    for wrong in ({"weight": 0}, {"max_running": -1}, {"colour": "red"}, {"allowed_base_models": ["gpt-9"]}):
        assert admin.post(path, json=wrong).status_code == 400
    for lax in ({"weight": "1"}, {"max_running": True}, {"max_storage_bytes": False}, {"is_disabled": 0}):
        assert admin.post(path, json=lax).status_code == 400, lax


def test_a_base_that_is_not_allowed_does_not_exist_for_the_tenant(
    api_url: str, admin: httpx.Client, tenant: Tenant
) -> None:
    with http(api_url, tenant.api_key) as client:
        file = good(client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", GOOD)}))
        good(admin.post(f"/admin/tenants/{tenant.slug}", json={"allowed_base_models": []}))
        body = {"model": BASE_MODEL, "training_file": file["id"]}
        refused = client.post("/v1/fine_tuning/jobs", json=body)
        unknown = client.post("/v1/fine_tuning/jobs", json=body | {"model": "x" * len(BASE_MODEL)})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert refused.text == unknown.text.replace("x" * len(BASE_MODEL), BASE_MODEL)
        assert client.get(f"/v1/models/{BASE_MODEL}").status_code == 404
        assert good(client.get("/v1/models"))["data"] == []
        good(admin.post(f"/admin/tenants/{tenant.slug}", json={"allowed_base_models": [BASE_MODEL]}))
        good(client.post("/v1/fine_tuning/jobs", json=body))


def test_the_database_itself_hides_a_base_that_is_not_allowed(owner: Engine, api: Engine, tenant: Tenant) -> None:
    with service_transaction(owner) as session:
        session.execute(text("update tenants set allowed_base_models = '{}' where id = :id"), {"id": tenant.id})
    with tenant_transaction(api, tenant.id) as session:
        assert session.scalars(text("select id from base_models")).all() == []


def test_a_base_switched_off_is_gone_for_everybody_until_it_is_switched_on(
    api_url: str, admin: httpx.Client, tenant: Tenant
) -> None:
    with http(api_url, tenant.api_key) as client:
        good(admin.post(f"/admin/base_models/{BASE_MODEL}", json={"is_disabled": True}))
        assert client.get(f"/v1/models/{BASE_MODEL}").status_code == 404
        good(admin.post(f"/admin/base_models/{BASE_MODEL}", json={"is_disabled": False}))
        assert client.get(f"/v1/models/{BASE_MODEL}").status_code == 200
    assert admin.post("/admin/base_models/gpt-9", json={"is_disabled": True}).status_code == 404


def test_an_operator_sees_why_a_base_cannot_be_used_and_a_tenant_only_that_it_cannot(
    api_url: str, admin: httpx.Client, owner: Engine, tenant: Tenant
) -> None:
    reason = "There is no base model at /models/x."
    with service_transaction(owner) as session:
        record_state(session, BASE_MODEL, state=BaseState.UNUSABLE, reason=reason, by="w1")
    try:
        (base,) = good(admin.get("/admin/base_models"))["data"]
        with http(api_url, tenant.api_key) as client:
            file = good(client.post("/v1/files", files={"file": ("a.jsonl", GOOD)}, data={"purpose": "fine-tune"}))
            body = {"model": BASE_MODEL, "training_file": file["id"]}
            refused = client.post("/v1/fine_tuning/jobs", json=body)
    finally:
        with service_transaction(owner) as session:
            record_state(session, BASE_MODEL, state=BaseState.USABLE, reason=None, by="w1")
    assert (base["state"], base["state_reason"], base["checked_by"]) == ("unusable", reason, "w1")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (409, "base_model_unusable", "model")
    assert "/models" not in refused.text


def test_a_change_is_written_down_with_who_made_it_and_no_secret(
    admin: httpx.Client, operator_key: str, tenant: Tenant
) -> None:
    key_id = operator_key.split("_")[2]
    good(admin.post(f"/admin/tenants/{tenant.slug}", json={"max_queued": 7}))
    entry = audit_of(admin, tenant)[0]
    assert (entry["actor"], entry["action"]) == (f"operator:olga:{key_id}", "tenant.changed")
    assert (entry["subject"], entry["before"], entry["after"]) == (tenant.slug, {"max_queued": 1000}, {"max_queued": 7})
    made = good(admin.post(f"/admin/tenants/{tenant.slug}/api_keys", json={"name": "ci"}))
    entry = audit_of(admin, tenant)[0]
    assert (entry["action"], entry["subject"]) == ("api_key.created", made["id"].removeprefix("key_"))
    assert "secret_hash" not in entry["after"]
    good(admin.delete(f"/admin/tenants/{tenant.slug}/api_keys/{made['id']}"))
    assert list(audit_of(admin, tenant)[0]["after"]) == ["revoked_at"]


def test_what_a_tenants_key_does_is_written_down_under_its_id(
    api_url: str, admin: httpx.Client, tenant: Tenant
) -> None:
    with http(api_url, tenant.api_key) as client:
        file = good(client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", GOOD)}))
        body = {"model": BASE_MODEL, "training_file": file["id"], "metadata": {"private": "words"}}
        job = good(client.post("/v1/fine_tuning/jobs", json=body))
        good(client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel"))
        good(client.delete(f"/v1/files/{file['id']}"))
    made = [entry for entry in audit_of(admin, tenant) if entry["actor"] == f"key:{tenant.key_id}"]
    assert [entry["action"] for entry in made] == ["file.changed", "job.changed", "job.created", "file.created"]
    assert made[1]["after"]["status"] == "cancelled"
    assert "private" not in str(made)


def test_a_change_that_is_rolled_back_leaves_no_entry(owner: Engine, tenant: Tenant) -> None:
    count = text("select count(*) from audit_entries where tenant_id = :id")
    with service_transaction(owner) as session:
        before = session.scalar(count, {"id": tenant.id})
        session.execute(text("update tenants set weight = 9 where id = :id"), {"id": tenant.id})
        assert session.scalar(count, {"id": tenant.id}) == before + 1
        session.rollback()
        assert session.scalar(count, {"id": tenant.id}) == before


@pytest.mark.parametrize("verb", ["insert", "update", "delete"])
@pytest.mark.parametrize("role", ["api", "operator", "worker", "schedule"])
def test_no_runtime_role_can_write_the_audit_log(database: Database, tenant: Tenant, role: str, verb: str) -> None:
    statement = {
        "insert": "insert into audit_entries (actor, action, subject, before, after) values ('a', 'b', 'c', '{}', '{}')",
        "update": "update audit_entries set actor = 'nobody'",
        "delete": "delete from audit_entries",
    }[verb]
    url = {"worker": database.worker_url, "schedule": database.schedule_url}.get(role, database.api_url)
    engine = connect(url)
    opened = operator_transaction(engine, actor="x") if role == "operator" else tenant_transaction(engine, tenant.id)
    with pytest.raises(ProgrammingError, match="permission denied"), opened as session:
        session.execute(text(statement))
    engine.dispose()


def test_the_apis_role_has_none_of_the_operators_rights_unless_it_asks_for_them(api: Engine, tenant: Tenant) -> None:
    for statement in (
        "select * from operator_keys",
        "update tenants set weight = 100",
        "insert into tenants values ()",
    ):
        with pytest.raises(ProgrammingError), tenant_transaction(api, tenant.id) as session:
            session.execute(text(statement))
    with tenant_transaction(api, tenant.id) as session:
        assert session.scalars(text("select slug from tenants")).all() == [tenant.slug]
    with service_transaction(api) as session:
        assert session.scalars(text("select number from audit_entries")).all() == []
        assert session.scalars(text("select current_user")).one() == "espalier_api"


def test_the_operators_role_sees_settings_and_nothing_that_tenants_own(api: Engine) -> None:
    for table in ("files", "jobs", "events", "metrics", "checkpoints", "adapters"):
        with (
            pytest.raises(ProgrammingError, match="permission denied"),
            operator_transaction(api, actor="x") as session,
        ):
            session.execute(text(f"select count(*) from {table}"))
