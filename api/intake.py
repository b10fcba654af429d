"""Datasets on their way in: checked line by line while they pass to the object store, whichever way they came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from uuid import UUID

from core.domain.datasets import DatasetChecker
from core.domain.ids import new_id
from core.domain.objects import file_key
from core.services.files import NewFile
from core.storage import ObjectStore


def store_dataset(chunks: Iterable[bytes], *, store: ObjectStore, tenant_id: UUID) -> NewFile:
    """Store a dataset and say what is wrong with its rows, if anything. Nothing is stored when `chunks` raises."""
    checker, file_id = DatasetChecker(), new_id()
    object_key = file_key(tenant_id, file_id)

    def checked() -> Iterator[bytes]:
        for chunk in chunks:
            checker.feed(chunk)
            yield chunk

    stored = store.put_stream(object_key, checked(), content_type="application/jsonl")
    report = checker.close()
    return NewFile(
        id=file_id,
        filename="upload.jsonl",
        purpose="fine-tune",
        object_key=object_key,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        num_examples=report.num_examples,
        status_details=report.summarize(),
        problems=tuple(asdict(problem) for problem in report.problems),
        report=report.counts,
    )
