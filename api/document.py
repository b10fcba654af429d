"""The OpenAPI document: what every operation can answer, errors included, and whether it needs a key.

FastAPI knows the answer of a route that succeeds. The errors that any request may meet are added here, by the
operation's path and method, so that no route has to list them.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from api.schemas.errors import Error

_OPEN_PREFIXES = ("/livez", "/readyz", "/startupz", "/metrics")
TAGS = [
    {"name": "files", "description": "Datasets, and the result files of jobs."},
    {"name": "uploads", "description": "Large files that are sent in parts."},
    {"name": "fine-tuning", "description": "Jobs, and everything that they tell of themselves."},
    {"name": "checkpoints", "description": "Adapters as they were at a step, and who may read them."},
    {"name": "graders", "description": "OpenAI's graders, which are refused here."},
    {"name": "models", "description": "Base models, and the caller's own fine-tuned models."},
    {"name": "adapters", "description": "Finished adapters and their files."},
    {"name": "api-keys", "description": "The API keys of an organization, for its administrators."},
    {"name": "admin", "description": "What operators do and see. It needs an operator's key."},
    {"name": "health", "description": "Probes for load balancers. They need no key."},
]
_DEFAULT_SUCCESS = "Successful Response"  # what FastAPI says of a route without `response_description`
_BEARER = {"type": "http", "scheme": "bearer", "description": "An API key of this service."}


def describe_refusal(description: str) -> dict[str, Any]:
    """Return the OpenAPI of an answer that is an error object."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": description, "content": content}


class DescribedApp(FastAPI):
    """An application whose document lists its errors."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _complete(super().openapi())
        assert self.openapi_schema is not None
        return self.openapi_schema


def _complete(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for ours_differ in ("HTTPValidationError", "ValidationError"):
        schemas.pop(ours_differ, None)
    schemas.update(_error_schemas())
    components["securitySchemes"] = {"bearer": _BEARER}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete_operation(operation, path=path, method=method)
            _describe_success(operation["responses"].get("200", {}), schemas)


def _error_schemas() -> dict[str, Any]:
    """Return the error object's schemas by name: no route returns it, so FastAPI does not know it."""
    schema = Error.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs"), "Error": schema}


def _complete_operation(operation: dict[str, Any], *, path: str, method: str) -> None:
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    for status in _refusals(operation, path=path, method=method):
        responses.setdefault(str(status.value), describe_refusal(status.phrase))
    if not path.startswith(_OPEN_PREFIXES):
        operation["security"] = [{"bearer": []}]


def _describe_success(answer: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Describe an answer by the first paragraph of its object's own description, unless the route describes it."""
    name = answer.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    if name and answer["description"] == _DEFAULT_SUCCESS:
        answer["description"] = schemas[name]["description"].partition("\n\n")[0]


def _refusals(operation: dict[str, Any], *, path: str, method: str) -> set[HTTPStatus]:
    statuses = {HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE}
    if path.startswith(_OPEN_PREFIXES):
        return statuses
    statuses |= {
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.NOT_FOUND,  # a thing of the path, or a cursor
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.GATEWAY_TIMEOUT,  # a statement that took too long
    }
    if method != "get":
        statuses.add(HTTPStatus.CONFLICT)
    if "requestBody" in operation:
        statuses.add(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    return statuses
