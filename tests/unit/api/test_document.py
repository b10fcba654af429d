"""The OpenAPI document explains every field, so that a client's author needs no other page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute

from tests.routes import all_routes, document

DOCUMENT = document()
OPERATIONS = {
    f"{method} {path}": operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}
LEAST_WORDS = 3
# The keys between a type and the thing that it is the type of.
AROUND_A_TYPE = ("schema", "items", "anyOf", "additionalProperties")
# A schema without any of these words allows anything.
NARROWING = {"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
SCHEMA_PLACE = re.compile(
    r"/(schema|itemSchema|contentSchema|items|additionalProperties"
    r"|(properties|patternProperties|schemas)/[^/]+|(anyOf|oneOf|allOf|prefixItems)/\d+)$"
)
# Objects whose keys nobody can list, and why.
FREE_FORM = {
    "#/components/schemas/AuditObject/properties/before": "the columns of whatever table was changed",
    "#/components/schemas/AuditObject/properties/after": "the columns of whatever table was changed",
    "#/components/schemas/LogLineObject/properties/data": "each name of a line has values of its own",
}


def schemas_in(node: Any, at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every schema of a part of the document, with its place."""
    if isinstance(node, dict):
        yield at, node
        for name, value in node.items():
            yield from schemas_in(value, f"{at}/{name}")
    if isinstance(node, list):
        for index, value in enumerate(node):
            yield from schemas_in(value, f"{at}/{index}")


def is_told(described: dict[str, Any]) -> bool:
    """Return whether a thing has a description that says something: three words at least."""
    return len(described.get("description", "").split()) >= LEAST_WORDS


def description_of(at: str) -> str:
    """Return the description of an enum, or of the nearest thing around it that it is the type of."""
    while "description" not in PLACES.get(at, {}):
        at, _, last = at.rpartition("/")
        assert last.isdigit() or last in AROUND_A_TYPE, f"{at}/{last} has no description"
    return str(PLACES[at]["description"])


def is_free_form(schema: dict[str, Any]) -> bool:
    """Return whether anything is allowed, or an object with any keys. A map names the type of its values, at least."""
    if not schema.keys() & NARROWING:
        return True
    is_known = schema.keys() & {"properties", "patternProperties"}
    return schema.get("type") == "object" and not is_known and schema.get("additionalProperties", True) in (True, {})


PLACES = dict(schemas_in(DOCUMENT, "#"))


def test_the_walk_finds_the_document() -> None:
    assert len(OPERATIONS) >= 58
    assert sum(len(schema.get("properties", ())) for _, schema in schemas_in(DOCUMENT, "#")) >= 480


@pytest.mark.parametrize("route", all_routes(), ids=lambda route: f"{'|'.join(sorted(route.methods))} {route.path}")
def test_every_operation_has_a_summary_of_its_own(route: APIRoute) -> None:
    assert route.summary, 'write summary="..." on the route: FastAPI would make one of the name of the function'


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_operation_and_every_parameter_of_it_is_described(operation: dict[str, Any]) -> None:
    assert is_told(operation)
    assert operation["description"].endswith("."), "the route's docstring is whole sentences"
    assert [each["name"] for each in operation.get("parameters", ()) if not is_told(each)] == []


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_success_is_described_and_has_a_schema(operation: dict[str, Any]) -> None:
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            assert is_told(answer), "write response_description=... on the route"
            assert answer["description"] != "Successful Response"
            assert status == "204" or answer["content"]
            assert all(each.get("schema") or each.get("itemSchema") for each in answer.get("content", {}).values())


def test_every_tag_is_described_and_used() -> None:
    used = {tag for operation in OPERATIONS.values() for tag in operation["tags"]}
    assert {tag["name"] for tag in DOCUMENT["tags"] if is_told(tag)} == used, "name it in TAGS of api/document.py"


def test_every_schema_and_every_property_is_described() -> None:
    components = DOCUMENT["components"]["schemas"]
    assert [name for name, schema in components.items() if not is_told(schema)] == []
    assert [
        f"{at}/properties/{name}"
        for at, schema in schemas_in(DOCUMENT, "#")
        for name, value in schema.get("properties", {}).items()
        if not is_told(value)
    ] == [], "write a string literal of three words or more below the field"


def test_every_object_names_its_keys_but_those_that_nobody_can_list() -> None:
    schemas = {at: schema for at, schema in PLACES.items() if SCHEMA_PLACE.search(at)}
    assert len(schemas) >= 900
    assert {at for at, schema in schemas.items() if is_free_form(schema)} == FREE_FORM.keys()


def test_every_value_of_an_enum_is_explained() -> None:
    enums = {at: schema["enum"] for at, schema in PLACES.items() if isinstance(schema.get("enum"), list)}
    assert len(enums) >= 20
    mute = [
        f"{at}: {value}" for at, values in enums.items() for value in values if f"`{value}`" not in description_of(at)
    ]
    assert mute == [], "name each value in backquotes in the docstring of its class or field"


def test_every_error_code_names_the_list_that_it_is_from() -> None:
    codes = {at: schema for at, schema in PLACES.items() if at.endswith("/properties/code") and "$ref" not in schema}
    assert len(codes) >= 4
    assert [
        at for at, schema in codes.items() if "list of error codes is in docs/errors.md" not in schema["description"]
    ] == []


def test_no_kind_or_status_of_a_schema_is_just_a_string() -> None:
    bare = [
        f"{at}/properties/{name}"
        for at, schema in schemas_in(DOCUMENT["components"]["schemas"], "")
        for name in {"object", "status", "level", "purpose", "type", "state", "basis"}
        & schema.get("properties", {}).keys()
        if not schema["properties"][name].keys() & {"const", "enum", "$ref"}
    ]
    assert bare == []
