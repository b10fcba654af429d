"""Validates objects against the schemas of Kubernetes and KEDA, strictly: unknown fields and unknown kinds are errors.

A separate program, run by a Python with kubernetes-validate: `k8s_schemas.py VERSIONS < OBJECTS`, both JSON lists. It
prints one line for each error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

CRDS = {"ScaledJob": "keda.sh_scaledjobs.json", "TriggerAuthentication": "keda.sh_triggerauthentications.json"}
ELSEWHERE = {"NodePool"}  # by node_pool.mjs


def main() -> None:
    versions = json.loads(sys.argv[1])
    validators = {kind: jsonschema.Draft202012Validator(read_crd(kind)) for kind in CRDS}
    for each in json.load(sys.stdin):
        if each["kind"] in ELSEWHERE:
            continue
        found = foreign_errors(validators[each["kind"]], each) if each["kind"] in CRDS else errors(each, versions)
        for error in found:
            print(f"{each['kind']} {each['metadata']['name']}: {error}")


def errors(each: dict[str, Any], versions: list[str]) -> Iterator[str]:
    for version in versions:
        try:
            kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            yield f"Kubernetes {version} knows no {each['kind']} of {each['apiVersion']}"
        except kubernetes_validate.ValidationError as error:
            yield f"{'.'.join(map(str, error.path))}: {error.message[:200]} (Kubernetes {version})"


def foreign_errors(validator: jsonschema.Draft202012Validator, each: dict[str, Any]) -> Iterator[str]:
    for error in validator.iter_errors(each):
        yield f"{'.'.join(map(str, error.path))}: {error.message[:200]}"


def read_crd(kind: str) -> Any:
    crd = json.loads((Path(__file__).parent / "schemas" / CRDS[kind]).read_text(encoding="utf-8"))
    (version,) = crd["spec"]["versions"]
    schema = as_strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    for name, value in (("apiVersion", f"{crd['spec']['group']}/{version['name']}"), ("kind", kind)):
        schema["properties"][name] = {"const": value}
    return schema


def as_strict(schema: Any) -> Any:
    """Return the schema with every object closed to fields that it does not name, as an API server would prune them."""
    if isinstance(schema, list):
        return [as_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: as_strict(each) for name, each in schema.items()}
    is_open = closed.get("x-kubernetes-preserve-unknown-fields")
    if closed.get("type") == "object" and "properties" in closed and not is_open:
        closed.setdefault("additionalProperties", False)
    if closed.get("x-kubernetes-int-or-string"):
        closed.pop("anyOf", None)
        closed["type"] = ["integer", "string"]
    return closed


if __name__ == "__main__":
    main()
