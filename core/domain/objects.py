"""Object keys. The server makes them from ids alone, below the tenant's prefix, and for attempts below the fence."""

from __future__ import annotations

import re
import uuid

OBJECTS_PREFIX = "tenants/"
_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_FILE_KEY = re.compile(rf"{OBJECTS_PREFIX}{_UUID}/files/({_UUID})/content\.jsonl")
# The location of a file, of an upload, or of one attempt. Never that of a whole tenant or job.
_LOCATION = re.compile(rf"{OBJECTS_PREFIX}{_UUID}/(?:files/{_UUID}/[^/]+|uploads/{_UUID}/|jobs/{_UUID}/[0-9]+/.*)")


def tenant_prefix(tenant_id: uuid.UUID) -> str:
    return f"{OBJECTS_PREFIX}{tenant_id}/"


def files_prefix(tenant_id: uuid.UUID) -> str:
    return f"{tenant_prefix(tenant_id)}files/"


def file_key(tenant_id: uuid.UUID, file_id: uuid.UUID) -> str:
    return f"{files_prefix(tenant_id)}{file_id}/content.jsonl"


def file_id_of(object_key: str) -> uuid.UUID | None:
    """Return the id of the file that has this key, or None for another key."""
    match = _FILE_KEY.fullmatch(object_key)
    return uuid.UUID(match[1]) if match else None


def is_location(location: str) -> bool:
    """Say whether a key, or a prefix that ends in a slash, belongs to one thing of one tenant and may be deleted."""
    return ".." not in location.split("/") and bool(_LOCATION.fullmatch(location))


def is_location_of(tenant_id: uuid.UUID, location: str) -> bool:
    """The same as `is_location`, for one tenant."""
    return location.startswith(tenant_prefix(tenant_id)) and is_location(location)


def job_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID) -> str:
    return f"{tenant_prefix(tenant_id)}jobs/{job_id}/"


def upload_prefix(tenant_id: uuid.UUID, upload_id: uuid.UUID) -> str:
    """Return where the parts of an upload are until it is completed, cancelled or expired."""
    return f"{tenant_prefix(tenant_id)}uploads/{upload_id}/"


def attempt_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID, lease_token: int) -> str:
    """Return where only this attempt may write. S3 has no fences, so every fence has its own prefix."""
    return f"{job_prefix(tenant_id, job_id)}{lease_token}/"


def tokenizer_key(sha256: str) -> str:
    """Return where a base model's tokenizer is stored. It belongs to the operator, not to a tenant."""
    return f"bases/tokenizers/{sha256}.json"
