"""Resume points as files: how they are written and fetched. A job resumes from one after a break.

A point consists of a slot's state, the job's progress and a manifest. The manifest is written and uploaded last, so if
it exists, the rest exists. A point is skipped, and the one before it used, in two cases: its bytes are not the stored
ones, or another version wrote it in a format that is not read here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from core.domain.values import Frozen
from worker.engine import CURSOR_FILE, TENSORS_FILE, SlotState, UnreadableStateError, read_cursor
from worker.messages import RemoteResumePoint
from worker.trainer.exports import MANIFEST, ResultRow, describe_file
from worker.trainer.failures import TransferError
from worker.trainer.transfers import IntegrityError, ObjectMissingError, Patience, download

PROGRESS_FILE = "progress.json"
_STATE_FILES = (TENSORS_FILE, CURSOR_FILE, PROGRESS_FILE)
RESUME_FILES = (*_STATE_FILES, MANIFEST)


class Progress(Frozen):
    """A job's results up to its resume point. `is_epoch_open` says that its last epoch is not yet evaluated."""

    format: Literal["espalier-resume-1"] = "espalier-resume-1"
    trained_tokens: int
    is_epoch_open: bool
    rows: tuple[ResultRow, ...]


@dataclass(frozen=True)
class FetchedPoint:
    directory: Path
    progress: Progress


def write_resume_point(directory: Path, state: SlotState, progress: Progress) -> None:
    directory.mkdir()
    state.write(directory)
    (directory / PROGRESS_FILE).write_text(progress.model_dump_json(), encoding="utf-8")
    files = [describe_file(directory / name).model_dump() for name in _STATE_FILES]
    manifest = {"format": "espalier-resume-1", "step": state.step, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def fetch_resume_point(
    points: tuple[RemoteResumePoint, ...], scratch: Path, *, patience: Patience, warn: Callable[[str], None]
) -> FetchedPoint | None:
    """Return the newest point that is complete and readable, or None.

    Raises TransferError when the store does not answer.
    """
    for point in points:
        directory = scratch / f"from-step-{point.step}"
        directory.mkdir()
        try:
            return _fetch(point, directory, patience)
        except (IntegrityError, ObjectMissingError, UnreadableStateError) as error:
            shutil.rmtree(directory)
            warn(f"The resume point of step {point.step} cannot be used: {error}")
        except TransferError as error:
            raise type(error)(f"The resume point of step {point.step} could not be fetched: {error}") from error
    return None


def _fetch(point: RemoteResumePoint, directory: Path, patience: Patience) -> FetchedPoint:
    """Fetch a point's files. The large one is fetched only if the small ones show that it can be read."""
    if not point.files.keys() >= set(_STATE_FILES):
        raise UnreadableStateError("Its files are those of another version of Espalier.")
    for name in (CURSOR_FILE, PROGRESS_FILE):
        download(point.files[name], directory / name, patience)
    read_cursor(directory)
    progress = _read_progress(directory / PROGRESS_FILE)
    download(point.files[TENSORS_FILE], directory / TENSORS_FILE, patience)
    return FetchedPoint(directory, progress)


def _read_progress(path: Path) -> Progress:
    try:
        return Progress.model_validate_json(path.read_bytes())
    except ValidationError:  # the bytes are intact, so this is another format and no damage
        raise UnreadableStateError("Its progress is of a format that another version of Espalier wrote.") from None
