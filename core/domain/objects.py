"""Object keys: made by the server from ids alone, each behind its tenant's prefix, and for jobs behind the fence."""

from __future__ import annotations

import uuid


def tenant_prefix(tenant_id: uuid.UUID) -> str:
    return f"tenants/{tenant_id}/"


def file_key(tenant_id: uuid.UUID, file_id: uuid.UUID) -> str:
    return f"{tenant_prefix(tenant_id)}files/{file_id}/content.jsonl"


def upload_prefix(tenant_id: uuid.UUID, upload_id: uuid.UUID) -> str:
    """Return where the parts of one upload lie until it is completed, cancelled or expired."""
    return f"{tenant_prefix(tenant_id)}uploads/{upload_id}/"


def attempt_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID, lease_token: int) -> str:
    """Return where one attempt may write, and nobody else: S3 has no fences, so every fence has its own prefix."""
    return f"{tenant_prefix(tenant_id)}jobs/{job_id}/{lease_token}/"
