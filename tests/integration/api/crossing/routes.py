"""The application's own routes, and requests to each with any id in any place."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

from fastapi.routing import APIRoute

from tests.factories.bases import BASE_MODEL
from tests.integration.api.planting import Planted
from tests.routes import all_routes, verbs_of

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
ROUTES = [route for route in all_routes() if route.path.startswith("/v1/")]
PLACED = [route for route in ROUTES if "{" in route.path]
LISTS = [route for route in ROUTES if "{" not in route.path and route.methods == {"GET"}]


def name_of(route: APIRoute) -> str:
    return f"{'|'.join(verbs_of(route))} {route.path}"


def places_of(route: APIRoute) -> list[str]:
    return re.findall(r"{(\w+)(?::path)?}", route.path)


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
    route = next(route for route in ROUTES if route.path == template and verb in verbs_of(route))
    return verb, path_of(route, own.ids, "", "")


def options_of(verb: str, route: APIRoute, own: Planted) -> dict[str, Any]:
    """Return the good body of a route that wants one."""
    wanted = BODIES.get(f"{verb} {route.path}")
    return {"json": fill(wanted[0], own, "", "")} if wanted else {}
