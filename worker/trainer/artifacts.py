"""The training loop's list of a job's artifacts: checkpoints and resume points that are stored or are being stored.

The loop hands each to a background thread (worker.trainer.publishing) and keeps its future. However many epochs a job
has, its scratch directory holds at most two adapters: a job that trains faster than its checkpoints are stored waits
for them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from worker.engine import SlotState
from worker.messages import UsageCounted
from worker.trainer.attempts import Attempt
from worker.trainer.exports import ResultRow
from worker.trainer.phases import Phase
from worker.trainer.publishing import (
    CheckpointWork,
    GiveBackWork,
    ResultWork,
    ResumePointWork,
    Storing,
    give_back_job,
    has_stored,
    publish_checkpoint,
    publish_result,
    store_resume_point,
)
from worker.trainer.resume import Progress


@dataclass(frozen=True)
class LocalCheckpoint:
    """An adapter in the scratch directory. Only the newest is needed after the object store has confirmed its bytes.

    If the supervisor cannot read them back, the attempt is over, and so is the directory.
    """

    directory: Path
    storing: Storing


class Pace:
    """Says when a slot's state is due: after some steps or seconds, and never while the last one is being stored."""

    def __init__(self, *, num_steps: int, seconds: float) -> None:
        self._num_steps = num_steps
        self._seconds = seconds
        self.last_try: Storing | None = None
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start counting here: this step's state is stored, or about to be."""
        self.step, self._begun_at = step, time.monotonic()

    def send(self, step: int, storing: Storing) -> None:
        self.begin(step)
        self.last_try = storing

    @property
    def is_free(self) -> bool:
        return self.last_try is None or self.last_try.done()

    @property
    def is_stored(self) -> bool:
        """Whether the state of `step` is in the object store now."""
        return self.last_try is None or has_stored(self.last_try)

    def is_due(self, step: int) -> bool:
        is_time = step - self.step >= self._num_steps or time.monotonic() - self._begun_at >= self._seconds
        return is_time and self.is_free


class JobArtifacts:
    """Hands a job's artifacts to background threads, as values that the loop never changes again.

    Only the training loop calls it. `pace` says when the next resume point is due.
    """

    def __init__(self, attempt: Attempt, *, pace: Pace) -> None:
        self.pace = pace
        self._attempt = attempt
        self._under_way: list[Storing] = []
        self._checkpoints: list[LocalCheckpoint] = []
        # The state with which the job leaves, unless an upload sent before has stored it.
        self._last_point: ResumePointWork | None = None

    @property
    def oldest_upload(self) -> Storing:
        """The upload that must end before there is room for another checkpoint."""
        return self._checkpoints[0].storing

    def has_room_for_checkpoint(self) -> bool:
        """Remove stored checkpoints except the newest. Beside the coming one, at most the newest may be left."""
        while len(self._checkpoints) > 1 and self._checkpoints[0].storing.done():
            shutil.rmtree(self._checkpoints.pop(0).directory)
        return len(self._checkpoints) <= 1

    def send_checkpoint(self, directory: Path, row: ResultRow, *, export: Phase) -> None:
        """Inspect and store an adapter in the background, as it is in `directory`, which is never written again."""
        work = CheckpointWork(directory, row, export, earlier=tuple(self._under_way))
        storing = self._run(partial(publish_checkpoint, self._attempt, work))
        self._checkpoints.append(LocalCheckpoint(directory, storing))

    def send_resume_point(self, state: SlotState, progress: Progress) -> None:
        """Write and store a slot's state in the background, unless the state of this step was sent already."""
        if state.step != self.pace.step:
            work = ResumePointWork(state, progress, earlier=tuple(self._under_way))
            self.pace.send(state.step, self._run(partial(store_resume_point, self._attempt, work)))

    def send_last_resume_point(self, state: SlotState, progress: Progress) -> None:
        """The same when the job leaves: if a step's upload has failed, or may fail, the state is stored again."""
        if state.step == self.pace.step and not self.pace.is_stored:
            self._last_point = ResumePointWork(state, progress, earlier=())
        self.send_resume_point(state, progress)

    def send_result(
        self, directory: Path, rows: tuple[ResultRow, ...], *, trained_tokens: int, usage: UsageCounted
    ) -> Future[None]:
        """Publish the last checkpoint, in `directory`, as the job's adapter."""
        work = ResultWork(directory, rows, trained_tokens, usage, earlier=tuple(self._under_way))
        return self._attempt.channel.run_in_background(partial(publish_result, self._attempt, work))

    def give_back(self, *, usage: UsageCounted) -> Future[None]:
        """Let running uploads end, and report that the job has left."""
        work = GiveBackWork(tuple(self._under_way), usage, last_point=self._last_point, last_try=self.pace.last_try)
        return self._attempt.channel.run_in_background(partial(give_back_job, self._attempt, work))

    def _run(self, work: Callable[[], bool]) -> Storing:
        storing = self._attempt.channel.run_in_background(work)
        self._under_way.append(storing)
        return storing
