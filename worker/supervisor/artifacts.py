"""Signs the URLs by which a trainer reads and writes, and verifies that it has stored what it reports.

Each attempt writes below its own prefix. What it reports as stored is read back before a row names it, in the order of
the reports. This happens on a separate thread, so that a slow object store delays neither leases nor steps.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import stamina
import structlog
from sqlalchemy import Engine

from core.db.models import File, Job, ResumePoint
from core.db.session import DATABASE_ERRORS, service_transaction
from core.domain.leases import Lease
from core.domain.objects import attempt_prefix, is_location, tokenizer_key
from core.domain.values import StoredArtifact, StoredFile
from core.services.base_models import record_tokenizer
from core.storage import ObjectNotFoundError, ObjectStore, StorageError, StorageUnavailableError, StoredObject
from core.telemetry.liveness import PROCESS
from worker.messages import (
    CheckpointSaved,
    JobFailed,
    JobSucceeded,
    JobYielded,
    RemoteFile,
    RemoteResumePoint,
    ResumePointSaved,
)

ArtifactReport = CheckpointSaved | ResumePointSaved | JobSucceeded | JobYielded | JobFailed
log = structlog.get_logger()
_URL_LIFETIME = timedelta(minutes=15)
_READING_SECONDS = 1800.0  # for reading back the artifacts of one report, besides the patience with the store


class ArtifactMismatchError(StorageError):
    """An object differs from what the trainer says it stored."""


def grant_file(store: ObjectStore, file: File) -> RemoteFile:
    url = store.presign_internal_get(file.object_key, expires=_URL_LIFETIME)
    return RemoteFile(url=url, sha256=file.sha256, size_bytes=file.size_bytes)


def artifact_prefix(lease: Lease, artifact: str) -> str:
    return f"{attempt_prefix(lease.tenant_id, lease.job_id, lease.token)}{artifact}/"


def grant_resume_point(store: ObjectStore, point: ResumePoint) -> RemoteResumePoint:
    artifact = StoredArtifact.of_row(point.object_prefix, point.files)
    files = {
        file.name: RemoteFile(
            url=store.presign_internal_get(artifact.object_prefix + file.name, expires=_URL_LIFETIME),
            sha256=file.sha256,
            size_bytes=file.size_bytes,
        )
        for file in artifact.files
    }
    return RemoteResumePoint(step=point.step, files=files)


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
    return StoredArtifact(object_prefix=prefix, files=files)


@dataclass(frozen=True)
class Proof:
    """A report whose artifacts were read back. `error` says how they differ from it; None means that they match."""

    lease: Lease
    report: ArtifactReport
    artifacts: tuple[StoredArtifact, ...] = ()
    error: StorageError | None = None


class ArtifactProver:
    """Reads back the artifacts of one report after another. Reports without artifacts keep their place in the order."""

    def __init__(self, store: ObjectStore, *, patience_seconds: float) -> None:
        self._store = store
        self._patience_seconds = patience_seconds
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._proofs: queue.SimpleQueue[Proof] = queue.SimpleQueue()
        self._life = PROCESS.add_duty("reading back artifacts", patience_seconds=patience_seconds + _READING_SECONDS)
        PROCESS.start_thread(self._work_forever, name="proofs")

    def submit(self, lease: Lease, report: ArtifactReport) -> None:
        self._work.put(lambda: self._proofs.put(self._prove(lease, report)))

    def delete_prefixes(self, prefixes: tuple[str, ...]) -> None:
        """Delete prefixes that no row names any more. Garbage collection does it later if this fails."""
        for prefix in prefixes:
            self._work.put(lambda prefix=prefix: self._delete(prefix))  # type: ignore[misc]

    def take(self) -> Proof | None:
        """Return the next proof, if there is one."""
        try:
            return self._proofs.get_nowait()
        except queue.Empty:
            return None

    def _work_forever(self) -> None:
        while True:
            self._life.rest()
            work = self._work.get()
            self._life.beat()
            work()

    def _prove(self, lease: Lease, report: ArtifactReport) -> Proof:
        try:
            for attempt in stamina.retry_context(
                on=StorageUnavailableError, attempts=None, timeout=self._patience_seconds, wait_max=5
            ):
                with attempt:
                    artifacts = tuple(
                        verify_artifact(self._store, lease, artifact=artifact, files=files)
                        for artifact, files in _artifacts_of(report)
                    )
        except StorageError as error:
            return Proof(lease, report, error=error)
        return Proof(lease, report, artifacts)

    def _delete(self, prefix: str) -> None:
        if not is_location(prefix):  # a damaged row may contain this; it could match all tenants' objects
            log.error("prefix.refused", prefix=prefix)
            return
        with contextlib.suppress(StorageError):
            self._store.delete_prefix(prefix)


def _artifacts_of(report: ArtifactReport) -> tuple[tuple[str, tuple[StoredFile, ...]], ...]:
    match report:
        case CheckpointSaved() | ResumePointSaved():
            return ((report.artifact, report.files),)
        case JobSucceeded():
            return (("adapter", report.adapter_files), ("result", (report.result_file,)))
        case _:
            return ()


def result_filename(job: Job) -> str:
    return f"step_metrics_{job.id.hex[-8:]}.csv"


def publish_tokenizer(engine: Engine, store: ObjectStore, base_model_id: str, path: Path) -> None:
    """Store a base's tokenizer, so that the API can show rows as tokens. Training does not wait for it."""
    content = path.read_bytes()
    object_key = tokenizer_key(hashlib.sha256(content).hexdigest())
    try:
        if store.stat(object_key) != len(content):
            store.put_bytes(object_key, content, content_type="application/json")
        with service_transaction(engine) as session:
            record_tokenizer(session, base_model_id, object_key=object_key)
    except (*DATABASE_ERRORS, StorageError) as error:
        log.warning("tokenizer.unpublished", base_model=base_model_id, error=type(error).__name__)
