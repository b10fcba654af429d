"""Object keys: made by the server from ids alone, each behind its tenant's prefix, and for jobs behind the fence."""

from __future__ import annotations

import re
import uuid

OBJECTS_PREFIX = "tenants/"
_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_FILE_KEY = re.compile(rf"{OBJECTS_PREFIX}{_UUID}/files/({_UUID})/content\.jsonl")
# Of a file, of an upload, or of one attempt at a job: never all that a tenant or a job has.
_LOCATION = re.compile(rf"{OBJECTS_PREFIX}{_UUID}/(?:files/{_UUID}/[^/]+|uploads/{_UUID}/|jobs/{_UUID}/[0-9]+/.*)")


def tenant_prefix(tenant_id: uuid.UUID) -> str:
    return f"{OBJECTS_PREFIX}{tenant_id}/"


def files_prefix(tenant_id: uuid.UUID) -> str:
    return f"{tenant_prefix(tenant_id)}files/"


def file_key(tenant_id: uuid.UUID, file_id: uuid.UUID) -> str:
    return f"{files_prefix(tenant_id)}{file_id}/content.jsonl"


def file_id_of(object_key: str) -> uuid.UUID | None:
    """Return whose key this is if it is a file's, else None."""
    match = _FILE_KEY.fullmatch(object_key)
    return uuid.UUID(match[1]) if match else None


def is_location(location: str) -> bool:
    """Say whether a key, or a prefix that ends in a slash, is of one thing of one tenant's, and may be deleted."""
    return ".." not in location.split("/") and bool(_LOCATION.fullmatch(location))


def is_location_of(tenant_id: uuid.UUID, location: str) -> bool:
    """As `is_location`, of this tenant."""
    return location.startswith(tenant_prefix(tenant_id)) and is_location(location)


def job_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID) -> str:
    return f"{tenant_prefix(tenant_id)}jobs/{job_id}/"


def upload_prefix(tenant_id: uuid.UUID, upload_id: uuid.UUID) -> str:
    """Return where the parts of one upload lie until it is completed, cancelled or expired."""
    return f"{tenant_prefix(tenant_id)}uploads/{upload_id}/"


def attempt_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID, lease_token: int) -> str:
    """Return where one attempt may write, and nobody else: S3 has no fences, so every fence has its own prefix."""
    return f"{job_prefix(tenant_id, job_id)}{lease_token}/"


def tokenizer_key(sha256: str) -> str:
    """Return where a base model's tokenizer is kept: the operator's, no tenant's."""
    return f"bases/tokenizers/{sha256}.json"
