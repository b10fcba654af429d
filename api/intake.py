"""Stores datasets as they arrive. They are checked line by line while they pass to the object store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Self
from uuid import UUID

from sqlalchemy import Engine

from api.metrics import STORED_BYTES, STORED_DATASETS
from core.db.models import File, Upload
from core.db.session import DATABASE_ERRORS, TenantSession, tenant_transaction
from core.domain.api_keys import Identity
from core.domain.datasets import DatasetChecker
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.objects import file_key
from core.services import uploads
from core.services.uploads import COMPLETION_LEASE, Completion
from core.storage import ObjectStore

# One thread checks at a time. More threads would not be faster, because only one of them holds the interpreter's lock,
# and requests would wait for each of them in turn.
_CHECKING = threading.Lock()
_EXTEND_SECONDS = 30.0  # well within the lease, like the longest wait for the store


def store_dataset(chunks: Iterable[bytes], *, store: ObjectStore, tenant_id: UUID) -> NewFile:
    """Store a dataset and say what is wrong with its rows, if anything. Nothing is stored when `chunks` raises."""
    checker, file_id = DatasetChecker(), new_id()
    object_key = file_key(tenant_id, file_id)

    def checked() -> Iterator[bytes]:
        for chunk in chunks:
            with _CHECKING:
                checker.feed(chunk)
            yield chunk

    stored = store.put_stream(object_key, checked(), content_type="application/jsonl")
    report = checker.close()
    STORED_DATASETS.labels("error" if report.problems else "processed").inc()
    STORED_BYTES.inc(stored.size_bytes)
    return NewFile(
        id=file_id,
        filename="upload.jsonl",
        purpose="fine-tune",
        object_key=object_key,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        num_examples=report.num_examples,
        status_details=report.summarize(),
        problems=report.problems,
        counts=report.counts,
    )


class HeldUpload:
    """An upload while it is being completed. If that fails, the upload is pending again."""

    def __init__(self, database: Engine, caller: Identity, completion: Completion) -> None:
        self._database, self._caller, self._completion = database, caller, completion
        self._is_over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._is_over:
            return
        with suppress(*DATABASE_ERRORS), self._transaction() as session:  # if this fails, the hold expires
            uploads.abandon_completion(session, self._caller.tenant_id, self._completion)

    def keep_while(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass chunks on and hold the upload until they end. Raises BusyError if another request has taken it.

        If the database is away, it is asked again at the next chunk. The work ends only when the lease has run out, and
        another request may have taken the upload.
        """
        held_at = time.monotonic()
        for chunk in chunks:
            now = time.monotonic()
            if now - held_at > _EXTEND_SECONDS:
                has_time = now - held_at < COMPLETION_LEASE.total_seconds()
                with suppress(*DATABASE_ERRORS if has_time else ()):
                    self._extend()
                    held_at = now
            yield chunk

    def complete(self, file: NewFile) -> tuple[Upload, File]:
        """Return the upload and the file that it has become. Raises BusyError if another request has taken it."""
        with self._transaction() as session:
            upload = uploads.complete_upload(session, self._caller.tenant_id, self._completion, file=file)
            row = uploads.find_file(session, upload)
            assert row is not None
            session.refresh(row)
        self._is_over = True
        return upload, row

    def _extend(self) -> None:
        with self._transaction() as session:
            extended = uploads.extend_completion(session, self._caller.tenant_id, self._completion)
        self._completion = extended

    def _transaction(self) -> AbstractContextManager[TenantSession]:
        return tenant_transaction(self._database, self._caller.tenant_id, actor=self._caller.actor)
