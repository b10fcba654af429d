"""What a trainer may read and write: presigned URLs under its own fence, and proof of what it says it has stored."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from core.db.models import File, Job
from core.db.session import service_transaction
from core.domain.objects import attempt_prefix, tokenizer_key
from core.services.attempts import Lease, StoredArtifact
from core.services.base_models import record_tokenizer
from core.storage import ObjectNotFoundError, ObjectStore, StorageError, StoredObject
from worker.messages import RemoteFile, StoredFile

log = structlog.get_logger()
_URL_LIFETIME = timedelta(minutes=15)


class ArtifactMismatchError(StorageError):
    """An object is not what the trainer says it stored."""


def grant_file(store: ObjectStore, file: File) -> RemoteFile:
    url = store.presign_internal_get(file.object_key, expires=_URL_LIFETIME)
    return RemoteFile(url=url, sha256=file.sha256, size_bytes=file.size_bytes)


def artifact_prefix(lease: Lease, artifact: str) -> str:
    return f"{attempt_prefix(lease.tenant_id, lease.job_id, lease.token)}{artifact}/"


def grant_uploads(store: ObjectStore, lease: Lease, *, artifact: str, names: tuple[str, ...]) -> dict[str, str]:
    """Return one presigned PUT URL a file, under this attempt's own prefix."""
    prefix = artifact_prefix(lease, artifact)
    return {name: store.presign_put(prefix + name, expires=_URL_LIFETIME) for name in names}


def verify_artifact(
    store: ObjectStore, lease: Lease, *, artifact: str, files: tuple[StoredFile, ...]
) -> StoredArtifact:
    """Read every object back and compare size and hash. Raises ArtifactMismatchError."""
    prefix = artifact_prefix(lease, artifact)
    for file in files:
        try:
            stored = store.hash_object(prefix + file.name)
        except ObjectNotFoundError as error:
            raise ArtifactMismatchError(f"{file.name} is not in the object store.") from error
        if stored != StoredObject(size_bytes=file.size_bytes, sha256=file.sha256):
            raise ArtifactMismatchError(f"{file.name} in the object store is not what the trainer wrote.")
    return StoredArtifact(object_prefix=prefix, files=tuple(file.model_dump() for file in files))


def result_filename(job: Job) -> str:
    return f"step_metrics_{job.id.hex[-8:]}.csv"


def publish_tokenizer(engine: Engine, store: ObjectStore, base_model_id: str, path: Path) -> None:
    """Store a base's tokenizer, so that the API can show rows as the base sees them. Training does not wait for it."""
    content = path.read_bytes()
    object_key = tokenizer_key(hashlib.sha256(content).hexdigest())
    try:
        if store.stat(object_key) != len(content):
            store.put_bytes(object_key, content, content_type="application/json")
        with service_transaction(engine) as session:
            record_tokenizer(session, base_model_id, object_key=object_key)
    except (OperationalError, StorageError) as error:
        log.warning("tokenizer.unpublished", base_model=base_model_id, error=type(error).__name__)
