"""API keys over their whole life: made with scopes, used, rotated, revoked within seconds, expired."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import Engine, select, text, update
from sqlalchemy.exc import IntegrityError

from api.auth import Authenticator
from core.db.models import ApiKeyRow
from core.db.session import service_transaction, tenant_transaction
from core.domain.api_keys import ALL_SCOPES, Identity, Scope, parse_api_key
from core.domain.errors import ConflictError, DomainError, NotFoundError, UnauthenticatedError
from core.services.api_keys import issue_api_key, list_api_keys, revoke_api_key, rotate_api_key
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction
from tests.waiting import PATIENCE_SECONDS, ask_until

REVOCATION_SECONDS = 5.0


@pytest.fixture
def http(api_url: str, tenant: Tenant) -> Iterator[httpx.Client]:
    """A client with the tenant's first key, which may do everything."""
    with connect_http(api_url, tenant.api_key) as client:
        yield client


def connect_http(api_url: str, api_key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {api_key}"}
    return httpx.Client(base_url=f"{api_url}/v1", headers=headers, trust_env=False, timeout=PATIENCE_SECONDS)


def make_key(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/api_keys", json={"name": "ci", **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def is_refused(api_url: str, api_key: str) -> bool:
    with connect_http(api_url, api_key) as client:
        return client.get("/models").status_code == 401


def test_a_keys_secret_is_in_the_answer_that_made_it_and_nowhere_else(http: httpx.Client, owner: Engine) -> None:
    made = make_key(http, scopes=["read"], expires_after={"anchor": "created_at", "seconds": 3600})
    secret = made["value"].split("_")[-1]
    assert made["redacted_value"] == made["value"][: made["value"].rindex("_") + 1] + "..."
    assert made["expires_at"] == made["created_at"] + 3600
    shown = http.get(f"/api_keys/{made['id']}").json()
    assert shown == {name: value for name, value in made.items() if name != "value"}
    assert secret not in json.dumps(http.get("/api_keys").json())
    with service_transaction(owner) as session:
        rows = session.execute(text("select row_to_json(k)::text from api_keys k")).scalars().all()
    assert not [row for row in rows if secret[:30] in row]


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        (Scope.READ, {"read"}),
        (Scope.SUBMIT, {"submit"}),
        (Scope.DOWNLOAD, {"download"}),
        (Scope.ADMIN, {"admin"}),
    ],
)
def test_a_key_may_do_what_its_scopes_say_and_nothing_else(
    api_url: str, http: httpx.Client, scope: Scope, allowed: set[str]
) -> None:
    key = make_key(http, scopes=[scope.value])["value"]
    nothing = "0" * 32
    with connect_http(api_url, key) as client:
        asked = {
            "read": client.get("/files"),
            "submit": client.delete(f"/files/file-{nothing}"),
            "download": client.get(f"/files/file-{nothing}/content"),
            "admin": client.get("/api_keys"),
        }
    refused = {name for name, answer in asked.items() if answer.status_code == 403}
    assert refused == set(asked) - allowed
    assert {error_of(asked[name]) for name in refused} == {(403, "insufficient_scope")}


def test_a_key_that_may_not_submit_is_refused_before_its_body_is_read(api_url: str, http: httpx.Client) -> None:
    key = make_key(http, scopes=["read"])["value"]
    with connect_http(api_url, key) as client:
        assert error_of(client.post("/fine_tuning/jobs", json={"nonsense": 1})) == (403, "insufficient_scope")


def test_two_keys_of_a_name_live_for_a_rotation_and_a_third_is_refused(api_url: str, http: httpx.Client) -> None:
    first, second = make_key(http), make_key(http)
    answer = http.post("/api_keys", json={"name": "ci"})
    assert error_of(answer) == (409, "too_many_live_keys")
    assert make_key(http, name="another")["id"]
    assert http.delete(f"/api_keys/{first['id']}").json()["deleted"] is True
    assert make_key(http)["id"] not in (first["id"], second["id"])
    assert not is_refused(api_url, second["value"])


def test_twenty_requests_at_once_never_make_a_third_live_key(api: Engine, tenant: Tenant) -> None:
    def issue(_number: int) -> bool:
        try:
            with tenant_transaction(api, tenant.id) as session:
                issue_api_key(session, tenant.id, name="ci")
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(10) as threads:
        assert sum(threads.map(issue, range(20))) == 2


def test_rotation_keeps_the_key_before_and_ends_the_one_before_that(owner: Engine, tenant: Tenant) -> None:
    with any_role_transaction(owner) as session:
        issued = [issue_api_key(session, tenant.id, name="ci").row.key_id]
        issued += [rotate_api_key(session, tenant.id, name="ci").row.key_id for _ in range(2)]
        live = [row.key_id for row in list_api_keys(session, tenant.id) if row.name == "ci"]
        assert live == issued[1:]


def test_rotation_keeps_the_scopes_the_maker_and_the_day_of_expiry(
    http: httpx.Client, owner: Engine, tenant: Tenant
) -> None:
    made = make_key(http, scopes=["read"], expires_after={"anchor": "created_at", "seconds": 3600})
    with any_role_transaction(owner) as session:
        row = rotate_api_key(session, tenant.id, name="ci").row
    assert row.scopes == ["read"]
    assert row.expires_at is not None
    assert int(row.expires_at.timestamp()) == made["expires_at"]
    assert row.created_by == tenant.key_id


def test_an_operator_may_give_a_rotated_key_a_new_lifetime(owner: Engine, tenant: Tenant) -> None:
    with any_role_transaction(owner) as session:
        first = issue_api_key(session, tenant.id, name="ci", lifetime=timedelta(hours=1)).row
        second = rotate_api_key(session, tenant.id, name="ci", lifetime=timedelta(hours=3)).row
    assert first.expires_at is not None
    assert second.expires_at == first.expires_at + timedelta(hours=2)  # one transaction has one now()


def test_a_name_of_which_no_key_is_alive_cannot_be_rotated_into_life(owner: Engine, tenant: Tenant) -> None:
    with any_role_transaction(owner) as session:
        key_id = issue_api_key(session, tenant.id, name="ci", scopes=frozenset({Scope.READ})).row.key_id
        revoke_api_key(session, tenant.id, key_id=key_id)
        with pytest.raises(NotFoundError, match="no live key"):
            rotate_api_key(session, tenant.id, name="ci")


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"scopes": ["admin", "download"]}, (403, "insufficient_scope", "scopes")),
        ({"expires_after": {"anchor": "created_at", "seconds": 7300}}, (403, "outlives_its_maker", "expires_after")),
    ],
)
def test_a_key_makes_no_key_that_may_do_more_than_itself_or_outlives_it(
    api_url: str, http: httpx.Client, fields: dict[str, Any], refusal: tuple[int, str, str]
) -> None:
    maker = make_key(http, scopes=["admin", "read"], expires_after={"anchor": "created_at", "seconds": 7200})
    with connect_http(api_url, maker["value"]) as client:
        answer = client.post("/api_keys", json={"name": "child", "scopes": ["read"], **fields})
    assert (*error_of(answer), answer.json()["error"]["param"]) == refusal


def test_what_is_not_asked_for_a_key_is_what_its_maker_has(api_url: str, http: httpx.Client) -> None:
    maker = make_key(http, scopes=["admin", "read"], expires_after={"anchor": "created_at", "seconds": 7200})
    with connect_http(api_url, maker["value"]) as client:
        child = make_key(client, name="child")
        assert (child["scopes"], child["expires_at"], child["created_by"]) == (
            ["read"],
            maker["expires_at"],
            maker["id"],
        )
        brief = make_key(client, name="brief", expires_after={"anchor": "created_at", "seconds": 60})
        assert brief["expires_at"] == brief["created_at"] + 60


def test_a_key_that_only_makes_keys_must_say_which_of_its_scopes_it_hands_on(api_url: str, http: httpx.Client) -> None:
    maker = make_key(http, scopes=["admin"])
    with connect_http(api_url, maker["value"]) as client:
        assert error_of(client.post("/api_keys", json={"name": "child"})) == (403, "insufficient_scope")
        assert make_key(client, name="deputy", scopes=["admin"])["scopes"] == ["admin"]


def test_a_key_revoked_a_moment_ago_makes_no_key_though_it_is_still_remembered(api: Engine, tenant: Tenant) -> None:
    with tenant_transaction(api, tenant.id) as session:
        revoke_api_key(session, tenant.id, key_id=tenant.key_id)
        with pytest.raises(UnauthenticatedError):
            issue_api_key(session, tenant.id, name="late", maker_id=tenant.key_id)


def test_a_key_is_revoked_alone_or_with_all_that_came_of_it(api_url: str, http: httpx.Client) -> None:
    def is_live(key: dict[str, Any]) -> bool:
        return http.get(f"/api_keys/{key['id']}").status_code == 200

    maker, other = (make_key(http, name=name, scopes=["admin", "read"]) for name in ("maker", "other"))
    with connect_http(api_url, maker["value"]) as client:
        child = make_key(client, name="child", scopes=["admin", "read"])
    with connect_http(api_url, child["value"]) as client:
        grandchild = make_key(client, name="grandchild")
    assert http.delete(f"/api_keys/{child['id']}").status_code == 200
    assert is_live(grandchild)
    answer = http.delete(f"/api_keys/{maker['id']}", params={"with_children": True})
    assert answer.status_code == 200
    assert not is_live(maker)
    assert not is_live(grandchild)
    assert is_live(other)


def test_a_revoked_key_is_refused_within_five_seconds_though_it_was_just_used(api_url: str, http: httpx.Client) -> None:
    made = make_key(http)
    assert not is_refused(api_url, made["value"])
    assert http.delete(f"/api_keys/{made['id']}").status_code == 200
    ask_until(lambda: is_refused(api_url, made["value"]), promised_seconds=REVOCATION_SECONDS)
    assert http.get(f"/api_keys/{made['id']}").status_code == 404
    assert http.delete(f"/api_keys/{made['id']}").status_code == 404


def test_an_open_stream_learns_within_five_seconds_that_its_key_was_revoked(
    api: Engine, owner: Engine, tenant: Tenant
) -> None:
    authenticator = Authenticator(api)
    identity = authenticator.identify(f"Bearer {tenant.api_key}")
    authenticator.recheck(identity)
    with any_role_transaction(owner) as session:
        revoke_api_key(session, tenant.id, key_id=tenant.key_id)

    def has_ended() -> bool:
        try:
            authenticator.recheck(identity)
        except UnauthenticatedError:
            return True
        return False

    ask_until(has_ended, promised_seconds=REVOCATION_SECONDS)


def test_an_expired_key_is_refused(owner: Engine, api: Engine, tenant: Tenant) -> None:
    with any_role_transaction(owner) as session:
        issued = issue_api_key(session, tenant.id, name="brief", lifetime=timedelta(hours=1))
    assert Authenticator(api).identify(f"Bearer {issued.api_key}").key_id == issued.row.key_id
    with service_transaction(owner) as session:
        session.execute(text("update api_keys set expires_at = now() where key_id = :id"), {"id": issued.row.key_id})
    with pytest.raises(UnauthenticatedError):
        Authenticator(api).identify(f"Bearer {issued.api_key}")


def test_a_disabled_tenants_keys_are_refused(owner: Engine, api: Engine, tenant: Tenant) -> None:
    with service_transaction(owner) as session:
        session.execute(text("update tenants set disabled_at = now() where id = :id"), {"id": tenant.id})
    with pytest.raises(DomainError) as refused:
        Authenticator(api).identify(f"Bearer {tenant.api_key}")
    assert refused.value.code == "organization_disabled"


def test_a_key_remembered_for_speed_is_not_believed_with_another_secret(api: Engine, tenant: Tenant) -> None:
    authenticator = Authenticator(api)
    authenticator.identify(f"Bearer {tenant.api_key}")
    forged = type(parse_api_key(tenant.api_key))(key_id=tenant.key_id, secret="A" * 30)
    with pytest.raises(UnauthenticatedError):
        authenticator.identify(f"Bearer {forged}")


def test_using_a_key_is_noted_once_a_minute_and_not_at_every_request(
    api: Engine, owner: Engine, tenant: Tenant
) -> None:
    def last_used() -> Any:
        with service_transaction(owner) as session:
            return session.scalars(select(ApiKeyRow.last_used_at).where(ApiKeyRow.key_id == tenant.key_id)).one()

    assert last_used() is None
    Authenticator(api).identify(f"Bearer {tenant.api_key}")
    noted = last_used()
    assert noted is not None
    Authenticator(api).identify(f"Bearer {tenant.api_key}")
    assert last_used() == noted
    with service_transaction(owner) as session:
        session.execute(text("update api_keys set last_used_at = now() - interval '61 seconds'"))
    Authenticator(api).identify(f"Bearer {tenant.api_key}")
    assert last_used() > noted


@pytest.mark.parametrize(
    "fields",
    [{"name": ""}, {"name": "a\x00b"}, {"scopes": []}, {"scopes": ["root"]}, {"colour": "red"}],
)
def test_a_bad_request_for_a_key_is_refused_by_its_field(http: httpx.Client, fields: dict[str, Any]) -> None:
    answer = http.post("/api_keys", json={"name": "ci", **fields})
    assert error_of(answer) == (400, "invalid_request")
    assert next(iter(fields)) in answer.json()["error"]["param"]


def test_the_database_knows_the_same_scopes_as_the_code(owner: Engine) -> None:
    query = text("select pg_get_constraintdef(oid) from pg_constraint where conname = 'ck_api_keys_scopes_known'")
    with service_transaction(owner) as session:
        rule = session.scalars(query).one()
    assert all(f"'{scope}'" in rule for scope in ALL_SCOPES)
    assert rule.count("::text") == len(ALL_SCOPES) + rule.count("::text[]")


def test_a_link_handed_out_for_a_key_that_soon_expires_expires_with_it() -> None:
    now = datetime.now(UTC)
    identity = Identity(uuid4(), "k", ALL_SCOPES, expires_at=now + timedelta(seconds=40))
    assert identity.limit_lifetime(timedelta(minutes=15), now=now) == timedelta(seconds=40)
    assert identity.limit_lifetime(timedelta(seconds=5), now=now) == timedelta(seconds=5)
    assert identity.limit_lifetime(timedelta(minutes=15), now=now + timedelta(hours=1)) == timedelta(seconds=1)
    assert replace(identity, expires_at=None).limit_lifetime(timedelta(minutes=15), now=now) == timedelta(minutes=15)


def test_the_database_refuses_a_maker_of_another_tenants(owner: Engine, tenant: Tenant, other_tenant: Tenant) -> None:
    with pytest.raises(IntegrityError), any_role_transaction(owner) as session:
        issued = issue_api_key(session, tenant.id, name="stray")
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == issued.row.id).values(created_by=other_tenant.key_id))
