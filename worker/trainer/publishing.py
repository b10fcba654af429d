"""Publishes a job's artifacts in the object store: checkpoints, resume points, the adapter. Runs on background threads.

The training loop continues meanwhile. So it hands over frozen values only: a copy of the slot's state, rows that never
change, files that are never written again. This module cannot reach the job itself, and the loop gets the result only
from the work's future.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from core.domain.values import StoredFile
from worker.engine import SlotState
from worker.messages import (
    CheckpointSaved,
    JobSucceeded,
    JobYielded,
    ResumePointSaved,
    UrlsWanted,
    UsageCounted,
)
from worker.trainer.attempts import Attempt
from worker.trainer.exports import (
    ADAPTER_FILES,
    RESULT_FILE,
    Provenance,
    ResultRow,
    describe_adapter,
    metrics_of,
    verify_adapter,
    write_result_csv,
)
from worker.trainer.failures import TransferError, UrlRefusedError
from worker.trainer.phases import Phase
from worker.trainer.resume import RESUME_FILES, Progress, write_resume_point
from worker.trainer.transfers import upload

# How often new URLs are requested for one artifact.
_MAX_URL_REFUSALS = 2
# The future of an artifact: True once it is stored, False if the store did not take it.
Storing = Future[bool]


@dataclass(frozen=True)
class CheckpointWork:
    """An adapter to inspect and store, as it was after `row`'s step. The engine has written its `directory`."""

    directory: Path
    row: ResultRow
    export: Phase
    earlier: tuple[Storing, ...]


@dataclass(frozen=True, eq=False)
class ResumePointWork:
    """A slot to store. `state` is a copy off the device, whose tensors are never written again."""

    state: SlotState
    progress: Progress
    earlier: tuple[Storing, ...]


@dataclass(frozen=True)
class ResultWork:
    """The last checkpoint's files, to store as the job's adapter, with the result file of its `rows`."""

    directory: Path
    rows: tuple[ResultRow, ...]
    trained_tokens: int
    usage: UsageCounted
    earlier: tuple[Storing, ...]


@dataclass(frozen=True, eq=False)
class GiveBackWork:
    """The uploads under way when a job is given back. `last_point` is stored again unless `last_try` has stored it."""

    earlier: tuple[Storing, ...]
    usage: UsageCounted
    last_point: ResumePointWork | None = None
    last_try: Storing | None = None


def has_stored(storing: Storing) -> bool:
    """Say whether an artifact is stored now, without waiting for it."""
    return storing.done() and storing.exception() is None and storing.result()


def publish_checkpoint(attempt: Attempt, work: CheckpointWork) -> bool:
    """Inspect and store a checkpoint. If the store does not take it, the job gets a warning.

    Raises AdapterInvalidError, DivergedError and NothingLearnedError, as verify_adapter does.
    """
    step, metrics = work.row.step, metrics_of(work.row)
    artifact = f"checkpoints/step-{step}"
    _inspect_adapter(attempt, work)
    attempt.report_phase(work.export)
    try:
        files = _upload(attempt, artifact, work.directory, ADAPTER_FILES)
        wait(work.earlier)  # checkpoints are listed in the order of their reports
    except TransferError as error:
        attempt.warn(f"The checkpoint of step {step} could not be stored: {error}")
        return False
    attempt.channel.send(
        CheckpointSaved(lease_token=attempt.lease_token, step=step, artifact=artifact, files=files, metrics=metrics)
    )
    return True


def store_resume_point(attempt: Attempt, work: ResumePointWork) -> bool:
    """Write and store a slot's state. If it cannot be stored, the job gets a warning."""
    step = work.state.step
    directory = attempt.directory / f"resume-{step}"
    artifact = f"resume/step-{step}"
    try:
        write_resume_point(directory, work.state, work.progress)
        files = _upload(attempt, artifact, directory, RESUME_FILES)
    except (TransferError, OSError, SafetensorError) as error:
        attempt.warn(f"The resume point of step {step} could not be stored: {error}")
        return False
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    wait(work.earlier)  # a checkpoint of this or an earlier step is reported first
    attempt.channel.send(ResumePointSaved(lease_token=attempt.lease_token, step=step, artifact=artifact, files=files))
    return True


def publish_result(attempt: Attempt, work: ResultWork) -> None:
    """Upload the last checkpoint's files as the adapter, and the result file.

    Raises AdapterInvalidError when a checkpoint did not pass its inspection.
    """
    for storing in work.earlier:  # the job's last checkpoint is reported before its end
        storing.result()
    write_result_csv(attempt.directory / RESULT_FILE, work.rows)
    adapter_files = _upload_last(attempt, "adapter", work.directory, ADAPTER_FILES)
    (result_file,) = _upload_last(attempt, "result", attempt.directory, (RESULT_FILE,))
    attempt.channel.send(work.usage)
    attempt.channel.send(
        JobSucceeded(
            lease_token=attempt.lease_token,
            adapter_files=adapter_files,
            result_file=result_file,
            trained_tokens=work.trained_tokens,
        )
    )


def give_back_job(attempt: Attempt, work: GiveBackWork) -> None:
    """Wait for the uploads under way, and report that the job has left."""
    wait(work.earlier)
    if work.last_point is not None and not (work.last_try and has_stored(work.last_try)):
        store_resume_point(attempt, work.last_point)
    attempt.channel.send(work.usage)
    attempt.channel.send(JobYielded(lease_token=attempt.lease_token))


def _inspect_adapter(attempt: Attempt, work: CheckpointWork) -> None:
    order, base = attempt.order, attempt.base
    provenance = Provenance(
        facts=order.facts.model_copy(update={"base_revision": base.revision}),
        spec=order.spec,
        training_sha256=order.training_file.sha256,
        validation_sha256=order.validation_file.sha256 if order.validation_file else None,
        step=work.row.step,
        metrics=metrics_of(work.row).by_name(),
    )
    describe_adapter(work.directory, provenance)
    verify_adapter(
        work.directory,
        adapter=order.spec.adapter,
        base_model_id=order.facts.base_model_id,
        base_config=base.model.config,
    )


def _upload_last(attempt: Attempt, artifact: str, directory: Path, names: tuple[str, ...]) -> tuple[StoredFile, ...]:
    try:
        return _upload(attempt, artifact, directory, names)
    except TransferError as error:
        raise type(error)(f"The {artifact} could not be stored: {error}") from error


def _upload(attempt: Attempt, artifact: str, directory: Path, names: tuple[str, ...]) -> tuple[StoredFile, ...]:
    phase = Phase("upload")
    wanted = UrlsWanted(lease_token=attempt.lease_token, artifact=artifact, names=names)
    stored = _upload_files(attempt, wanted, directory)
    size_bytes = sum(file.size_bytes for file in stored)
    done = attempt.report_phase(phase, artifact=artifact, size_bytes=size_bytes)
    attempt.log("artifact.uploaded", artifact=artifact, size_bytes=size_bytes, seconds=round(done.seconds, 3))
    return stored


def _upload_files(attempt: Attempt, wanted: UrlsWanted, directory: Path) -> tuple[StoredFile, ...]:
    """Store files one after another. If URLs are refused, as after a long upload, new ones are requested."""
    urls = attempt.channel.request_urls(wanted, check=attempt.check_wanted)
    stored: list[StoredFile] = []
    num_refusals = 0
    while len(stored) < len(wanted.names):
        name = wanted.names[len(stored)]
        try:
            stored.append(upload(urls[name], directory / name, attempt.patience))
        except UrlRefusedError:
            num_refusals += 1
            if num_refusals > _MAX_URL_REFUSALS:
                raise
            urls = attempt.channel.request_urls(wanted, check=attempt.check_wanted)
    return tuple(stored)
