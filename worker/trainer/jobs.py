"""One job in the training loop: the results of its steps, and when they lead to an artifact.

Only the loop's thread calls a `TrainerJob`. Slow work runs on background threads, which get values only. The module
worker.trainer.preparing prepares the job, and worker.trainer.publishing publishes it through its `JobArtifacts`. A
job's files are in its own scratch directory, which vanishes with it.

The end of an epoch, each step at a boundary between two fused steps:

    last step of the epoch -> evaluation, if there is a validation file -> checkpoint -> next epoch, or the end
                                             rest in the slot while there is no room ^
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from core.domain.dataset_counts import DatasetName
from core.domain.training import count_steps
from worker.engine import DivergedError, Engine, EngineJob, Evaluation, InvalidJobError, SlotReport, StepMetrics
from worker.messages import EvaluationDone, JobStarted, LoadBase, StartJob, StepDone, StepSkipped, UsageCounted
from worker.trainer.artifacts import JobArtifacts, Pace
from worker.trainer.attempts import Attempt
from worker.trainer.bases import LoadedBase
from worker.trainer.channel import Channel
from worker.trainer.datasets import TokenizedDataset
from worker.trainer.exports import ResultRow
from worker.trainer.phases import Phase
from worker.trainer.preparing import PreparedJob
from worker.trainer.publishing import Storing
from worker.trainer.resume import FetchedPoint, Progress


@dataclass
class Usage:
    """What a job has used here, and what earlier attempts have trained."""

    device_seconds: float = 0.0
    trained_tokens: int = 0
    tokens_before: int = 0

    @property
    def all_tokens(self) -> int:
        return self.tokens_before + self.trained_tokens

    def count(self, lease_token: int) -> UsageCounted:
        return UsageCounted(
            lease_token=lease_token, gpu_seconds=self.device_seconds, trained_tokens=self.trained_tokens
        )


class TrainerJob:
    """A job's life in the loop. `close` calls off its background work and removes its scratch directory.

    `is_preparing` lasts until its datasets are tokenised. `is_ending` is set when it has left its slot, or will not get
    one, and `is_waiting` once the device had no memory for it. While it rests in its slot, it waits for
    `awaited_upload`.
    """

    def __init__(
        self, order: StartJob, *, channel: Channel, base: LoadedBase, base_order: LoadBase, scratch_dir: Path
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory(dir=scratch_dir, ignore_cleanup_errors=True)
        self.attempt = Attempt(
            order=order,
            base=base,
            channel=channel,
            directory=Path(self._scratch.name),
            storage_patience_seconds=base_order.storage_patience_seconds,
        )
        self.lease_token = order.lease_token
        pace = Pace(num_steps=base_order.resume_steps, seconds=base_order.resume_seconds)
        self._artifacts = JobArtifacts(self.attempt, pace=pace)
        self._usage = Usage()
        self._validation: TokenizedDataset | None = None
        self._rows: list[ResultRow] = []
        self._is_last_step_taken = False
        self._is_epoch_open = False  # its last step is done, its checkpoint is not written
        self._training: Phase | None = None
        self._evaluation: Phase | None = None
        self.awaited_upload: Storing | None = None
        self.is_preparing = True
        self.is_ending = False
        self.is_waiting = False

    def as_engine_job(self, prepared: PreparedJob) -> EngineJob:
        self._validation = prepared.validation
        order = self.attempt.order
        return EngineJob(
            slot_name=str(self.lease_token),
            spec=order.spec,
            examples=prepared.training.examples,
            tenant=order.tenant_id,
            share=order.share,
        )

    def begin(self, engine: Engine, prepared: PreparedJob) -> bool:
        """Resume from the resume point, if there is one, and report its step. True when the engine is done."""
        step = self._restore(engine, prepared.resume) if prepared.resume else 0
        # A job stored between its last step and the evaluation that follows has only this evaluation left.
        total_steps = count_steps(self.attempt.order.spec, len(prepared.training.examples))
        self._is_last_step_taken = step == total_steps
        self._artifacts.pace.begin(step)
        self._training = Phase("train")
        self.attempt.channel.send(JobStarted(lease_token=self.lease_token, step=step, total_steps=total_steps))
        if self._is_epoch_open:
            self._end_epoch(engine)
        return self._is_trained

    def end_training(self) -> None:
        """Report how long the job was on the device, once."""
        if self._training is not None:
            self.attempt.report_phase(self._training)
            self._training = None

    def use_device(self, seconds: float) -> None:
        self._usage.device_seconds += seconds

    def bill(self) -> None:
        """Report what the job has used so far."""
        self.attempt.channel.send(self._usage.count(self.lease_token))

    def take_report(self, engine: Engine, report: SlotReport) -> bool:
        """Process a step's report. At an epoch's end, evaluate and then save. True when the engine is done.

        Raises DivergedError at the end of a job whose every step was skipped: its adapter is still the initial one.
        """
        if report.update is not None:
            self._take_update(report.update)
            if report.update.is_epoch_end:
                self._end_epoch(engine)
            elif self._artifacts.pace.is_due(report.update.step):
                self.save_resume_point(engine)
        elif report.evaluation is not None:
            self._take_evaluation(report.evaluation)
            self._publish_epoch(engine)
        return self._is_trained

    def go_on(self, engine: Engine) -> bool:
        """End the rest, now that there is room for another checkpoint. True when the engine is done."""
        self.awaited_upload = None
        engine.end_rest(str(self.lease_token))
        self._publish_epoch(engine)
        return self._is_trained

    @property
    def file_in_use(self) -> DatasetName:
        """The file whose rows are on the device."""
        return "training" if self._evaluation is None else "validation"

    def save_resume_point(self, engine: Engine) -> None:
        """Copy the slot's state off the device. The copy is written and stored in the background."""
        self._artifacts.send_resume_point(engine.capture_state(str(self.lease_token)), self._progress)

    def save_last_resume_point(self, engine: Engine) -> None:
        """Copy the slot's state as the job leaves. If a step's upload has failed, or may fail, it is stored again."""
        self._artifacts.send_last_resume_point(engine.capture_state(str(self.lease_token)), self._progress)

    def give_back(self) -> Future[None]:
        """Report that the job has left, after all uploads that are under way."""
        return self._artifacts.give_back(usage=self._usage.count(self.lease_token))

    def publish(self) -> Future[None]:
        """Store the last checkpoint's files as the adapter, and the result file, and report success."""
        return self._artifacts.send_result(
            self._checkpoint_directory,
            tuple(self._rows),
            trained_tokens=self._usage.all_tokens,
            usage=self._usage.count(self.lease_token),
        )

    def close(self) -> None:
        self.attempt.call_off()
        self._scratch.cleanup()

    @property
    def _is_trained(self) -> bool:
        return self._is_last_step_taken and not self._is_epoch_open

    @property
    def _progress(self) -> Progress:
        tokens = self._usage.all_tokens
        return Progress(trained_tokens=tokens, is_epoch_open=self._is_epoch_open, rows=tuple(self._rows))

    def _restore(self, engine: Engine, point: FetchedPoint) -> int:
        """Return the step after which the slot resumes."""
        try:
            step = engine.load_state(str(self.lease_token), point.directory)
        except InvalidJobError as error:
            self.attempt.warn(f"{error} The job starts from its first step.")
            return 0
        finally:
            shutil.rmtree(point.directory)
        self._rows = list(point.progress.rows)
        self._usage.tokens_before = point.progress.trained_tokens
        self._is_epoch_open = point.progress.is_epoch_open
        return step

    def _take_update(self, update: StepMetrics) -> None:
        self._is_last_step_taken = update.is_last
        self._usage.trained_tokens += update.num_tokens
        if update.is_skipped:
            total_steps = update.total_steps
            self.attempt.channel.send(
                StepSkipped(lease_token=self.lease_token, step=update.step, total_steps=total_steps)
            )
        else:
            self._report_step(update)

    def _report_step(self, update: StepMetrics) -> None:
        self._rows.append(ResultRow(update.step, update.loss, update.token_accuracy))
        self.attempt.channel.send(
            StepDone(
                lease_token=self.lease_token,
                step=update.step,
                total_steps=update.total_steps,
                train_loss=update.loss,
                train_token_accuracy=update.token_accuracy,
                learning_rate=update.learning_rate,
                grad_norm=update.grad_norm,
                num_tokens=update.num_tokens,
            )
        )

    def _end_epoch(self, engine: Engine) -> None:
        self.bill()
        if not self._rows and self._is_last_step_taken:
            raise DivergedError("The gradient was not finite in any step. Lower the learning rate.")
        if not self._rows or self._checkpoint_directory.exists():
            return  # every step of the epoch was skipped: there is nothing new to evaluate or to store
        self._is_epoch_open = True
        if self._validation is not None:
            self._evaluation = Phase("evaluate")
            engine.begin_evaluation(str(self.lease_token), self._validation.examples)
        else:
            self._publish_epoch(engine)

    def _take_evaluation(self, result: Evaluation) -> None:
        if self._evaluation is not None:
            self.attempt.report_phase(self._evaluation)
            self._evaluation = None
        # A row already in a resume point stays as it is, because background threads may be writing it.
        self._rows[-1] = replace(
            self._rows[-1], valid_loss=result.loss, valid_mean_token_accuracy=result.token_accuracy
        )
        self.attempt.channel.send(
            EvaluationDone(
                lease_token=self.lease_token,
                step=self._rows[-1].step,
                loss=result.loss,
                token_accuracy=result.token_accuracy,
            )
        )

    def _publish_epoch(self, engine: Engine) -> None:
        """Store the epoch's checkpoint, or rest in the slot until the oldest upload has ended."""
        if not self._artifacts.has_room_for_checkpoint():
            self.awaited_upload = self._artifacts.oldest_upload
            engine.rest(str(self.lease_token))  # the other jobs use the device meanwhile
            self.attempt.log("checkpoint.delayed", step=self._rows[-1].step)
            return
        self._save_checkpoint(engine)
        self._is_epoch_open = False
        if not self._is_last_step_taken and self._artifacts.pace.is_free:
            self.save_resume_point(engine)

    def _save_checkpoint(self, engine: Engine) -> None:
        """Write the adapter as it is now. Its inspection and its upload run in the background."""
        directory = self._checkpoint_directory
        export = Phase("export")
        directory.mkdir()
        engine.export_adapter(str(self.lease_token), directory)
        self._artifacts.send_checkpoint(directory, self._rows[-1], export=export)

    @property
    def _checkpoint_directory(self) -> Path:
        """The path of the adapter after its last step that changed it."""
        return self.attempt.directory / f"step-{self._rows[-1].step}"
