"""Two tenants who cannot meet: every route, verb and kind of id crossed, generated from the application's own routes.

An answer about another tenant's thing is the answer about a thing that never was: the same status, words, headers and the
same questions to the database. Then the wall is taken down one half at a time: with the tenant filter stripped from every
statement, row-level security still answers nothing; with both gone the same requests do leak, so the test has eyes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event, text

from api.auth import Authenticator
from api.main import create_app
from api.resources import resources_of
from core.db.base import Row
from core.db.session import connect, service_transaction, tenant_transaction
from core.settings import ApiSettings
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.integration.api.planting import Planted, plant
from tests.integration.conftest import BASE_MODEL, Database, Tenant, add_tenant
from tests.routes import all_routes
from tests.waiting import PATIENCE_SECONDS

# Which kind of id stands in which place of a path. A route with a place that is not here fails the test: add it.
PLACES = {
    "file_id": "file",
    "job_id": "job",
    "adapter_id": "adapter",
    "key_id": "api_key",
    "model": "model",
    "upload_id": "upload",
    "checkpoint": "checkpoint_model",
    "permission_id": "permission",
}
# A good body for every route that wants one, so that nothing but the id can be at fault. `{kind}` is the crossed id.
BODIES: dict[str, list[dict[str, Any]]] = {
    "POST /v1/fine_tuning/jobs": [
        {"model": BASE_MODEL, "training_file": "{file}"},
        {"model": BASE_MODEL, "training_file": "{own_file}", "validation_file": "{file}"},
        {"model": "{model}", "training_file": "{own_file}"},
        {"model": "{checkpoint_model}", "training_file": "{own_file}"},
        {"model": "{adapter}", "training_file": "{own_file}"},
    ],
    "POST /v1/files/{file_id}/preview": [{"model": BASE_MODEL}, {"model": "{model}"}],
    "POST /v1/api_keys": [{"name": "ci"}],
    "POST /v1/uploads": [{"bytes": 10, "filename": "a.jsonl", "mime_type": "text/plain", "purpose": "fine-tune"}],
    "POST /v1/uploads/{upload_id}/complete": [{"part_ids": ["{part}"]}],
    "POST /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions": [{"project_ids": ["nobody-there"]}],
}
# Bodies that are forms, read as they stream; they name nothing but their own bytes.
FORMS = {"POST /v1/files"}
# Routes that refuse whatever they are sent.
REFUSING = {"POST /v1/fine_tuning/alpha/graders/validate", "POST /v1/fine_tuning/alpha/graders/run"}
CURSORS = {
    "/v1/files": "file",
    "/v1/fine_tuning/jobs": "job",
    "/v1/adapters": "adapter",
    "/v1/fine_tuning/jobs/{job_id}/events": "event",
    "/v1/fine_tuning/jobs/{job_id}/checkpoints": "checkpoint",
    "/v1/fine_tuning/jobs/{job_id}/logs": "log_line",
    "/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions": "permission",
}
VERBS = ("GET", "POST", "PUT", "PATCH", "DELETE")
CHANGING_HEADERS = {"x-request-id", "date", "ratelimit"}

ROUTES = [route for route in all_routes() if route.path.startswith("/v1/")]
PLACED = [route for route in ROUTES if "{" in route.path]
LISTS = [route for route in ROUTES if "{" not in route.path and route.methods == {"GET"}]
TENANT_TABLES = sorted(name for name, table in Row.metadata.tables.items() if "tenant_id" in table.c)


def name_of(route: APIRoute) -> str:
    return f"{'|'.join(sorted(route.methods))} {route.path}"


def places_of(route: APIRoute) -> list[str]:
    return re.findall(r"{(\w+)(?::path)?}", route.path)


@dataclass
class Watched:
    """One running application, and what it asks its database."""

    client: TestClient
    statements: list[str] = field(default_factory=list)
    num_stripped: int = 0
    is_stripping: bool = False
    known: set[str] = field(default_factory=set)

    def ask(self, verb: str, path: str, tenant: Tenant, **options: Any) -> httpx.Response:
        """Send a request with the tenant's key, which is known already: finding out about it is not counted."""
        headers = {"authorization": f"Bearer {tenant.api_key}"}
        self._refresh(headers["authorization"])
        self.statements.clear()
        return self.client.request(verb, path, headers=headers, **options)

    def _refresh(self, authorization: str) -> None:
        """Make sure that the application has looked the key up, once: here it believes a key for ever."""
        if authorization in self.known:
            return
        state: Any = self.client.app.state  # type: ignore[attr-defined]
        was_stripping, self.is_stripping = self.is_stripping, False
        authenticator = Authenticator(state.resources.engine)
        authenticator.identify(authorization)
        state.resources = replace(state.resources, authenticator=authenticator)
        self.known = {authorization}
        self.is_stripping = was_stripping


_FILTER = re.compile(r"\b\w+\.tenant_id = %\(\w+\)s(::UUID)?")


@contextmanager
def running(database_url: str, addresses: ServerAddresses) -> Iterator[Watched]:
    storage = addresses.storage
    settings = ApiSettings(
        database_url=database_url,
        s3_endpoint=storage.endpoint,
        s3_access_key=storage.access_key,
        s3_secret_key=storage.secret_key,
        s3_bucket=storage.bucket,
    )
    app: FastAPI = create_app(settings)
    with (
        pytest.MonkeyPatch.context() as patch,
        TestClient(app, raise_server_exceptions=False) as client,
    ):
        patch.setattr("api.auth.TTL_SECONDS", 3600.0)
        watched = Watched(client)

        @event.listens_for(resources_of(app).engine, "before_cursor_execute", retval=True)
        def watch(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> tuple[str, Any]:
            if not statement.startswith(
                "SELECT clock_timestamp()"
            ):  # by which the process reads the database's time, now and then
                watched.statements.append(statement)
            if watched.is_stripping:
                statement, number = _FILTER.subn("true", statement)
                watched.num_stripped += number
            return statement, parameters

        yield watched
        resources_of(app).engine.dispose()


@pytest.fixture(scope="module")
def api(database: Database) -> Iterator[Engine]:
    engine = connect(database.api_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def store(servers: ServerAddresses) -> S3ObjectStore:
    made = S3ObjectStore(servers.storage)
    made.ensure_bucket()
    return made


@pytest.fixture(scope="module")
def victim(owner: Engine) -> Tenant:
    return add_tenant(owner)


@pytest.fixture(scope="module")
def asker(owner: Engine) -> Tenant:
    return add_tenant(owner)


@pytest.fixture(scope="module")
def planted(owner: Engine, api: Engine, store: S3ObjectStore, victim: Tenant) -> Planted:
    return plant(owner, api, store, victim)


@pytest.fixture(scope="module")
def own(owner: Engine, api: Engine, store: S3ObjectStore, asker: Tenant) -> Planted:
    return plant(owner, api, store, asker)


@pytest.fixture(scope="module")
def walled(database: Database, servers: ServerAddresses) -> Iterator[Watched]:
    """The application as it runs: the API's own database role."""
    with running(database.api_url, servers) as watched:
        yield watched


@pytest.fixture(scope="module")
def unwalled(database: Database, servers: ServerAddresses) -> Iterator[Watched]:
    """The application as a superuser of the database: no row-level security, only the filters."""
    with running(database.superuser_url, servers) as watched:
        yield watched


def never_was(wire_id: str) -> str:
    """Return an id of the same form and age that names nothing: the last characters differ."""
    head, step, number = wire_id.partition(":ckpt-step-")
    if step:
        return never_was(head) + step + number
    swapped = wire_id[-4:].translate(str.maketrans("0123456789abcdefABCDEFGHIJ", "1032547698badcfeBADCFEHGJI"))
    if swapped == wire_id[-4:]:
        swapped = "0000" if wire_id[-4:] != "0000" else "1111"
    return wire_id[:-4] + swapped


def path_of(route: APIRoute, planted_ids: dict[str, str], place: str, wire_id: str) -> str:
    """Fill the crossed place with an id, and the others with what they are meant for."""
    path = route.path
    for each in places_of(route):
        value = wire_id if each == place else planted_ids[PLACES[each]]
        path = re.sub(rf"{{{each}(:path)?}}", quote(value, safe=":/"), path)
    return path


def fill(body: dict[str, Any], own: Planted, kind: str, wire_id: str) -> dict[str, Any]:
    known = {f"{{own_{name}}}": value for name, value in own.ids.items()} | {f"{{{kind}}}": wire_id}

    def filled(value: Any) -> Any:
        return [filled(each) for each in value] if isinstance(value, list) else known.get(value, value)

    return {name: filled(value) for name, value in body.items()}


def filled_path(name: str, own: Planted) -> tuple[str, str]:
    """Return verb and path of a route by its name, with the asker's own ids in the path."""
    verb, _, template = name.partition(" ")
    route = next(route for route in ROUTES if route.path == template and verb in route.methods)
    return verb, path_of(route, own.ids, "", "")


def options_of(verb: str, route: APIRoute, own: Planted) -> dict[str, Any]:
    """Return the good body of a route that wants one."""
    wanted = BODIES.get(f"{verb} {route.path}")
    return {"json": fill(wanted[0], own, "", "")} if wanted else {}


def seen(answer: httpx.Response, wire_id: str) -> tuple[int, str, dict[str, str]]:
    """Return everything of an answer that a caller can see, with the id it asked for made anonymous."""
    headers = {name: value for name, value in answer.headers.items() if name not in CHANGING_HEADERS}
    return answer.status_code, answer.text.replace(wire_id, "ID"), headers


def snapshot(owner: Engine, tenant: Tenant) -> dict[str, list[str]]:
    """Return every row of a tenant, as text."""
    with service_transaction(owner) as session:
        return {
            name: list(
                session.scalars(
                    text(f"select to_jsonb(t)::text from {name} t where tenant_id = :id order by 1"), {"id": tenant.id}
                )
            )
            for name in TENANT_TABLES
            if name != "api_keys"  # notes when its keys are used
        }


def test_no_route_is_uncovered() -> None:
    assert len(PLACED) >= 10
    unknown = {place for route in PLACED for place in places_of(route)} - set(PLACES)
    assert not unknown, f"say in PLACES what stands there, and plant one: {unknown}"
    asking = {f"{verb} {route.path}": route for route in ROUTES for verb in route.methods}
    with_body = {name for name, route in asking.items() if route.body_field}
    assert with_body <= set(BODIES), "say in BODIES what a good body is, with the ids that it may name"
    forms = {name for name in asking if name.startswith("POST") and "{" not in name} - with_body
    assert forms == FORMS | REFUSING, "say in FORMS that it reads its body itself"
    cursors = {route.path for route in ROUTES if any(each.name == "after" for each in route.dependant.query_params)}
    assert cursors == set(CURSORS), "say in CURSORS which kind of id continues the list"


def test_every_table_with_a_tenant_is_planted(owner: Engine, planted: Planted, victim: Tenant) -> None:
    del planted
    empty = {name for name, rows in snapshot(owner, victim).items() if not rows}
    assert not empty, f"plant a row in tests/integration/api/planting.py: {empty}"


@pytest.mark.parametrize("route", PLACED, ids=name_of)
@pytest.mark.parametrize("is_stripping", [False, True], ids=["as-it-is", "filter-stripped"])
def test_another_tenants_thing_is_a_thing_that_never_was(
    walled: Watched,
    owner: Engine,
    planted: Planted,
    own: Planted,
    victim: Tenant,
    asker: Tenant,
    route: APIRoute,
    is_stripping: bool,
) -> None:
    walled.is_stripping, walled.num_stripped = is_stripping, 0
    before = snapshot(owner, victim)
    for place in places_of(route):
        for kind, wire_id in planted.ids.items():
            for verb in VERBS if kind == PLACES[place] else sorted(route.methods):
                told = []
                for each in (wire_id, never_was(wire_id)):
                    path = path_of(route, own.ids, place, each)
                    answer = walled.ask(verb, path, asker, **options_of(verb, route, own))
                    told.append((seen(answer, each), list(walled.statements)))
                assert told[0] == told[1], (verb, place, kind)
                # An id with slashes in a place that takes none is another path, and says so by itself.
                fits = "/" not in wire_id or f"{{{place}:path}}" in route.path
                if verb in route.methods and fits:
                    assert answer.status_code == 404, (verb, place, kind, answer.text)
                assert answer.status_code in {400, 404, 405}
    walled.is_stripping = False
    assert snapshot(owner, victim) == before
    assert walled.num_stripped > 0 or not is_stripping


@pytest.mark.parametrize("route", LISTS, ids=name_of)
@pytest.mark.parametrize("is_stripping", [False, True], ids=["as-it-is", "filter-stripped"])
def test_a_list_shows_nothing_of_another_tenants(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, route: APIRoute, is_stripping: bool
) -> None:
    del own
    walled.is_stripping = is_stripping
    answer = walled.ask("GET", route.path, asker)
    walled.is_stripping = False
    assert answer.status_code == 200
    assert not [name for name, value in planted.ids.items() if value in answer.text]


@pytest.mark.parametrize("route", CURSORS)
def test_a_cursor_of_another_tenants_is_one_that_never_was(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, route: str
) -> None:
    kind, told = CURSORS[route], []
    _, path = filled_path(f"GET {route}", own)
    for each in (planted.ids[kind], never_was(planted.ids[kind])):
        answer = walled.ask("GET", path, asker, params={"after": each})
        told.append((seen(answer, each), list(walled.statements)))
    assert told[0] == told[1]


@pytest.mark.parametrize("route", sorted(BODIES))
@pytest.mark.parametrize("is_stripping", [False, True], ids=["as-it-is", "filter-stripped"])
def test_a_body_that_names_another_tenants_thing_is_refused_like_one_that_names_nothing(
    walled: Watched,
    owner: Engine,
    planted: Planted,
    own: Planted,
    victim: Tenant,
    asker: Tenant,
    route: str,
    is_stripping: bool,
) -> None:
    verb, path = filled_path(route, own)
    walled.is_stripping = is_stripping
    before = snapshot(owner, victim), snapshot(owner, asker)
    for body in BODIES[route]:
        for kind in re.findall(r"'{(?!own_)(\w+)}'", str(body)):
            told = []
            for each in (planted.ids[kind], never_was(planted.ids[kind])):
                answer = walled.ask(verb, path, asker, json=fill(body, own, kind, each))
                told.append((seen(answer, each), list(walled.statements)))
            assert told[0] == told[1], (body, kind)
            assert answer.status_code in (400, 404), answer.text
    walled.is_stripping = False
    assert (snapshot(owner, victim), snapshot(owner, asker)) == before


@pytest.mark.parametrize("route", sorted(BODIES))
def test_nobody_chooses_an_id_or_a_tenant(
    walled: Watched, own: Planted, planted: Planted, asker: Tenant, route: str
) -> None:
    verb, path = filled_path(route, own)
    good = fill(BODIES[route][0], own, "file", own.file)
    for name, value in (("id", planted.job), ("tenant_id", planted.tenant), ("organization_id", planted.tenant)):
        answer = walled.ask(verb, path, asker, json=good | {name: value})
        assert answer.status_code == 400, (name, answer.text)


@pytest.mark.parametrize("route", PLACED, ids=name_of)
def test_the_filter_alone_hides_another_tenants_thing_too(
    unwalled: Watched, planted: Planted, own: Planted, asker: Tenant, route: APIRoute
) -> None:
    for place in places_of(route):
        for verb in route.methods:
            wire_id = planted.ids[PLACES[place]]
            answer = unwalled.ask(verb, path_of(route, own.ids, place, wire_id), asker, **options_of(verb, route, own))
            assert answer.status_code == 404, (verb, place, answer.text)


def test_with_both_halves_of_the_wall_down_the_same_requests_do_leak(
    unwalled: Watched, planted: Planted, own: Planted, asker: Tenant
) -> None:
    unwalled.is_stripping = True
    leaking = set()
    looking = [route for route in PLACED if route.methods == {"GET"} and not route.path.endswith("/stream")]
    for route in looking:
        place = places_of(route)[0]
        path = path_of(route, planted.ids, place, planted.ids[PLACES[place]])
        answer = unwalled.ask("GET", path, asker, **options_of("GET", route, own))
        leaking |= {route.path} if answer.status_code == 200 else set()
    lists = {route.path for route in LISTS if planted.job in unwalled.ask("GET", route.path, asker).text}
    unwalled.is_stripping = False
    assert leaking == {route.path for route in looking}
    assert lists >= {"/v1/fine_tuning/jobs"}


@pytest.mark.parametrize("table", TENANT_TABLES)
def test_the_database_alone_keeps_every_table_apart(
    owner: Engine, api: Engine, planted: Planted, own: Planted, victim: Tenant, asker: Tenant, table: str
) -> None:
    del planted, own
    before = snapshot(owner, victim)
    with service_transaction(owner) as session:
        may_look = session.scalars(text("select has_table_privilege('espalier_api', :t, 'SELECT')"), {"t": table}).one()
        columns = list(
            session.scalars(
                text(
                    "select column_name from information_schema.column_privileges where grantee = 'espalier_api' and privilege_type = 'UPDATE' and table_name = :t"
                ),
                {"t": table},
            )
        )
        may_delete = session.scalars(
            text("select has_table_privilege('espalier_api', :t, 'DELETE')"), {"t": table}
        ).one()
    with tenant_transaction(api, asker.id) as session:
        if may_look:
            assert set(session.scalars(text(f"select distinct tenant_id from {table}"))) == {asker.id}
        for column in columns:
            changed = session.execute(
                text(f"update {table} set {column} = {column} where tenant_id = :id"), {"id": victim.id}
            )
            assert changed.rowcount == 0
        if may_delete:
            assert session.execute(text(f"delete from {table} where tenant_id = :id"), {"id": victim.id}).rowcount == 0
        session.rollback()
    assert snapshot(owner, victim) == before


def test_sharing_with_a_tenant_does_not_tell_whether_there_is_one(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, victim: Tenant
) -> None:
    path, told = f"/v1/fine_tuning/checkpoints/{own.checkpoint_model}/permissions", []
    for each in (planted.tenant, never_was(planted.tenant), victim.slug, never_was(victim.slug)):
        answer = walled.ask("POST", path, asker, json={"project_ids": [each]})
        shown = answer.json()["data"][0]
        told.append((answer.status_code, sorted(shown), list(walled.statements)))
        walled.ask("DELETE", f"{path}/{shown['id']}", asker)
    assert told == [told[0]] * 4


def test_a_shared_checkpoint_is_read_by_whom_it_names_and_ends_with_the_permission(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, victim: Tenant
) -> None:
    path = f"/v1/fine_tuning/checkpoints/{planted.checkpoint_model}"
    made = walled.ask("POST", f"{path}/permissions", victim, json={"project_ids": [own.tenant]}).json()["data"][0]
    assert walled.ask("GET", path, asker).status_code == 200
    for verb, refused in (("DELETE", f"/v1/models/{planted.checkpoint_model}"), ("GET", f"{path}/permissions")):
        assert walled.ask(verb, refused, asker).status_code == 404
    assert walled.ask("DELETE", f"{path}/permissions/{made['id']}", asker).status_code == 404
    assert walled.ask("DELETE", f"{path}/permissions/{made['id']}", victim).status_code == 200
    assert walled.ask("GET", path, asker).status_code == 404


def test_a_presigned_url_opens_one_object_of_its_tenant_for_fifteen_minutes_and_nothing_else(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, victim: Tenant
) -> None:
    told = walled.ask("GET", f"/v1/adapters/{own.adapter}/download", asker).json()
    (url,) = [file["url"] for file in told["files"]]
    with httpx.Client(trust_env=False, timeout=PATIENCE_SECONDS) as stranger:
        assert stranger.get(url).status_code == 200
        assert f"/tenants/{asker.id}/" in url
        assert 0 < int(httpx.URL(url).params["X-Amz-Expires"]) <= 900
        own_key, *_ = [key for key in own.object_keys if key in url]
        for key in planted.object_keys + tuple(key for key in own.object_keys if key != own_key):
            assert stranger.get(url.replace(own_key, key)).status_code in (403, 404)
        assert stranger.get(url.replace(str(asker.id), str(victim.id))).status_code in (403, 404)
        assert stranger.get(url.partition("?")[0]).status_code in (403, 404)
        assert stranger.get(re.sub(r"X-Amz-Expires=\d+", "X-Amz-Expires=86400", url)).status_code == 403
        for verb in ("PUT", "DELETE", "POST"):
            assert stranger.request(verb, url).status_code in (403, 405)
        assert stranger.get(url).status_code == 200


def test_one_idempotency_key_of_two_tenants_makes_two_jobs(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, victim: Tenant
) -> None:
    made = []
    for tenant, file in ((asker, own.file), (victim, planted.file)):
        headers = {"authorization": f"Bearer {tenant.api_key}", "idempotency-key": "the-same"}
        body = {"model": BASE_MODEL, "training_file": file}
        answer = walled.client.post("/v1/fine_tuning/jobs", headers=headers, json=body)
        assert answer.status_code == 200, answer.text
        made.append(answer.json())
    assert made[0]["id"] != made[1]["id"]
    assert made[0]["organization_id"] != made[1]["organization_id"]
