"""Prepares a job for training: its tokenised datasets and its resume point. Runs on a background thread.

URLs have just been signed when the order comes, so all files are fetched before the first is tokenised.
"""

from __future__ import annotations

import datetime as dt
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from core.domain.dataset_counts import DatasetName
from worker.messages import DatasetsRead, RemoteFile
from worker.trainer.attempts import Attempt
from worker.trainer.datasets import TokenizedDataset, read_examples, tokenize_dataset
from worker.trainer.failures import TransferError
from worker.trainer.phases import Phase
from worker.trainer.resume import FetchedPoint, fetch_resume_point
from worker.trainer.transfers import download


@dataclass(frozen=True)
class PreparedJob:
    training: TokenizedDataset
    validation: TokenizedDataset | None
    resume: FetchedPoint | None


def prepare_job(attempt: Attempt) -> PreparedJob:
    """Fetch what the order names, and then tokenise. Raises JobFaultError and TransferError."""
    load = Phase("load")
    files: dict[DatasetName, RemoteFile] = {"training": attempt.order.training_file}
    if attempt.order.validation_file is not None:
        files["validation"] = attempt.order.validation_file
    for name, file in files.items():
        _fetch(attempt, name, file)
    resume = _fetch_resume_point(attempt)
    datasets = {name: _tokenize(attempt, name) for name in files}
    training, validation = datasets["training"], datasets.get("validation")
    counts = validation.counts if validation else None
    attempt.channel.send(DatasetsRead(lease_token=attempt.lease_token, training=training.counts, validation=counts))
    attempt.report_phase(load)
    return PreparedJob(training=training, validation=validation, resume=resume)


def _fetch(attempt: Attempt, name: DatasetName, file: RemoteFile) -> None:
    try:
        download(file, _dataset_path(attempt, name), attempt.patience)
    except TransferError as error:
        raise type(error)(f"The {name} file could not be fetched: {error}", file=name) from error


def _fetch_resume_point(attempt: Attempt) -> FetchedPoint | None:
    points = attempt.order.resume_points
    resume = fetch_resume_point(points, attempt.directory, patience=attempt.patience, warn=attempt.warn)
    if resume is None and points:
        attempt.warn("No resume point can be used; the job starts from its first step.")
    return resume


def _tokenize(attempt: Attempt, name: DatasetName) -> TokenizedDataset:
    started = time.monotonic()
    path = _dataset_path(attempt, name)
    size_bytes = path.stat().st_size
    # If the attempt is called off meanwhile, its datasets are discarded, complete or not.
    examples = itertools.takewhile(lambda _: not attempt.is_called_off.is_set(), read_examples(path, file=name))
    dataset = tokenize_dataset(
        attempt.base.tokenizer,
        examples,
        max_seq_len=attempt.order.spec.max_seq_len,
        file=name,
        now=_created_at(attempt),
    )
    path.unlink()
    attempt.log(
        "dataset.tokenized",
        file=name,
        size_bytes=size_bytes,
        num_tokens=sum(example.num_tokens for example in dataset.examples),
        **dataset.counts.model_dump(),
        seconds=round(time.monotonic() - started, 3),
    )
    return dataset


def _dataset_path(attempt: Attempt, name: DatasetName) -> Path:
    return attempt.directory / f"{name}.jsonl"


def _created_at(attempt: Attempt) -> dt.datetime:
    """Return the date that a template writes. It is the same for every attempt, so that all train on the same rows."""
    return dt.datetime.fromtimestamp(attempt.order.facts.created_at)  # noqa: DTZ006 (the local time)
