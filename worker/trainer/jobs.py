"""One job inside the trainer: prepared on a thread, trained in the engine, published on a thread.

A job's files live in a scratch directory of its own that vanishes with it. However many epochs it has, the directory
holds two adapters at most: a job that trains faster than its checkpoints are stored waits for them.
"""

from __future__ import annotations

import datetime as dt
import itertools
import shutil
import tempfile
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from core.domain.dataset_counts import DatasetName
from core.domain.training import count_steps
from core.domain.values import StoredFile
from worker.engine import (
    DivergedError,
    Engine,
    EngineJob,
    Evaluation,
    InvalidJobError,
    SlotReport,
    SlotState,
    StepMetrics,
)
from worker.messages import (
    CheckpointSaved,
    DatasetsRead,
    EvaluationDone,
    JobLogged,
    JobStarted,
    JobSucceeded,
    JobWarned,
    JobYielded,
    LoadBase,
    PhaseDone,
    RemoteFile,
    ResumePointSaved,
    StartJob,
    StepDone,
    StepSkipped,
    UrlsWanted,
    UsageCounted,
)
from worker.trainer.bases import LoadedBase
from worker.trainer.channel import Channel
from worker.trainer.datasets import TokenizedDataset, read_examples, tokenize_dataset
from worker.trainer.exports import (
    ADAPTER_FILES,
    RESULT_FILE,
    Provenance,
    ResultRow,
    describe_adapter,
    verify_adapter,
    write_result_csv,
)
from worker.trainer.failures import JobStoppedError, TransferError, UrlRefusedError
from worker.trainer.phases import Phase
from worker.trainer.resume import (
    RESUME_FILES,
    FetchedPoint,
    Pace,
    Progress,
    fetch_resume_point,
    write_resume_point,
)
from worker.trainer.transfers import Patience, download, upload

# So often are an artifact's URLs asked for anew.
_MAX_URL_REFUSALS = 2


@dataclass(frozen=True)
class PreparedJob:
    training: TokenizedDataset
    validation: TokenizedDataset | None
    resume: FetchedPoint | None


@dataclass(frozen=True)
class LocalCheckpoint:
    """An adapter in the scratch directory. Only the newest is needed once the object store has confirmed its bytes.

    Should the supervisor not be able to read them back, the attempt is over, and with it the directory.
    """

    directory: Path
    upload: Future[None]


class TrainerJob:
    """The life of one job here, known by its lease token. `close` removes its scratch directory.

    `is_preparing` until its datasets are tokenised; `is_ending` when it has left its slot, or will not get one;
    `is_waiting` once the device has had no memory for it. While it rests in its slot, `awaited_upload` is what for.
    """

    def __init__(
        self, order: StartJob, *, channel: Channel, base: LoadedBase, base_order: LoadBase, scratch_dir: Path
    ) -> None:
        self.lease_token = order.lease_token
        self._order = order
        self._channel = channel
        self._base = base
        self._scratch = tempfile.TemporaryDirectory(dir=scratch_dir, ignore_cleanup_errors=True)
        self._directory = Path(self._scratch.name)
        self._validation: TokenizedDataset | None = None
        self._rows: list[ResultRow] = []
        self._is_last_step_taken = False
        self._is_epoch_open = False
        self._pace = Pace(num_steps=base_order.resume_steps, seconds=base_order.resume_seconds)
        self._patience = Patience(base_order.storage_patience_seconds, check=self._check_wanted)
        self._uploads: list[Future[None]] = []
        self._stored_step = 0
        self._checkpoints: list[LocalCheckpoint] = []
        self.awaited_upload: Future[None] | None = None
        # What the job leaves with, unless an upload that was sent before it left has stored it.
        self._left_with: tuple[SlotState, Progress] | None = None
        self._device_seconds = 0.0
        self._trained_tokens = 0
        self._tokens_before = 0
        self._training: Phase | None = None
        self._evaluation: Phase | None = None
        self.is_preparing = True
        self.is_ending = False
        self.is_waiting = False
        self._is_closed = False

    @property
    def ids(self) -> dict[str, str | int]:
        """What a line of the process's log names this attempt by."""
        return {
            "job_id": self._order.facts.job_id,
            "lease_token": self.lease_token,
            "tenant_id": self._order.tenant_id,
        }

    def prepare(self) -> PreparedJob:
        """Fetch what the order names, while its URLs are young, and then tokenise. Runs on a background thread."""
        load = Phase("load")
        prepared = self._prepare()
        self._report_phase(load)
        return prepared

    def _prepare(self) -> PreparedJob:
        files: dict[DatasetName, RemoteFile] = {"training": self._order.training_file}
        if self._order.validation_file is not None:
            files["validation"] = self._order.validation_file
        for name, file in files.items():
            try:
                download(file, self._dataset_path(name), self._patience)
            except TransferError as error:
                raise type(error)(f"The {name} file could not be fetched: {error}", file=name) from error
        resume = fetch_resume_point(
            self._order.resume_points, self._directory, patience=self._patience, warn=self._warn
        )
        if resume is None and self._order.resume_points:
            self._warn("No resume point can be used; the job starts from its first step.")
        datasets = {name: self._tokenize(name) for name in files}
        training, validation = datasets["training"], datasets.get("validation")
        counts = validation.counts if validation else None
        self._channel.send(DatasetsRead(lease_token=self.lease_token, training=training.counts, validation=counts))
        return PreparedJob(training=training, validation=validation, resume=resume)

    def as_engine_job(self, prepared: PreparedJob) -> EngineJob:
        self._validation = prepared.validation
        return EngineJob(
            slot_name=str(self.lease_token),
            spec=self._order.spec,
            examples=prepared.training.examples,
            tenant=self._order.tenant_id,
            share=self._order.share,
        )

    def begin(self, engine: Engine, prepared: PreparedJob) -> bool:
        """Go on from the resume point, if there is one, and say from where. True when the engine is done."""
        step = self._restore(engine, prepared.resume) if prepared.resume else 0
        # Stored between its last step and the evaluation that follows, a job has only that left to do.
        total_steps = count_steps(self._order.spec, len(prepared.training.examples))
        self._is_last_step_taken = step == total_steps
        self._pace.begin(step)
        self._stored_step = step
        self._training = Phase("train")
        self._channel.send(JobStarted(lease_token=self.lease_token, step=step, total_steps=total_steps))
        if self._is_epoch_open:
            self._end_epoch(engine)
        return self._is_trained

    def end_training(self) -> None:
        """Say how long the job was on the device, once."""
        if self._training is not None:
            self._report_phase(self._training)
            self._training = None

    def use_device(self, seconds: float) -> None:
        self._device_seconds += seconds

    def bill(self) -> None:
        """Report what the job has used so far."""
        self._channel.send(
            UsageCounted(
                lease_token=self.lease_token,
                gpu_seconds=self._device_seconds,
                trained_tokens=self._trained_tokens,
            )
        )

    def take_report(self, engine: Engine, report: SlotReport) -> bool:
        """Take what a step did for the job; at an epoch's end, evaluate, then save. True when the engine is done.

        Raises DivergedError at the end of a job whose every step was skipped: its adapter is what it was drawn as.
        """
        if report.update is not None:
            self._take_update(report.update)
            if report.update.is_epoch_end:
                self._end_epoch(engine)
            elif self._pace.is_due(report.update.step):
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
    def _is_trained(self) -> bool:
        return self._is_last_step_taken and not self._is_epoch_open

    def save_resume_point(self, engine: Engine) -> None:
        """Copy the slot's state; writing and storing it go on in the background."""
        state = engine.capture_state(str(self.lease_token))
        if state.step != self._pace.step:
            self._send_resume_point(state)

    def save_last_resume_point(self, engine: Engine) -> None:
        """Copy the slot's state as the job leaves: a step whose upload has failed, or may fail, is stored again."""
        state = engine.capture_state(str(self.lease_token))
        if state.step != self._pace.step:
            self._send_resume_point(state)
        elif state.step != self._stored_step:
            self._left_with = state, self._progress

    @property
    def _progress(self) -> Progress:
        tokens = self._tokens_before + self._trained_tokens
        return Progress(trained_tokens=tokens, is_epoch_open=self._is_epoch_open, rows=tuple(self._rows))

    def _send_resume_point(self, state: SlotState) -> None:
        progress = self._progress
        earlier = tuple(self._uploads)
        upload = self._channel.run_in_background(lambda: self._store_resume_point(state, progress, earlier))
        self._pace.send(state.step, upload)
        self._uploads.append(upload)

    def give_back(self) -> None:
        """Wait for what is on its way, and report that the job has left. Runs on a background thread."""
        wait(self._uploads)
        if self._left_with is not None and self._left_with[0].step != self._stored_step:
            self._store_resume_point(*self._left_with, earlier=())
        self.bill()
        self._channel.send(JobYielded(lease_token=self.lease_token))

    def publish(self) -> None:
        """Upload the last checkpoint's files as the adapter, and the result file. Runs on a background thread.

        Raises AdapterInvalidError when a checkpoint did not pass its inspection.
        """
        for upload_of_checkpoint in self._uploads:  # the job's last checkpoint is known before its end
            upload_of_checkpoint.result()
        write_result_csv(self._directory / RESULT_FILE, self._rows)
        adapter_files = self._upload_last("adapter", self._checkpoint_directory, ADAPTER_FILES)
        (result_file,) = self._upload_last("result", self._directory, (RESULT_FILE,))
        self.bill()
        self._channel.send(
            JobSucceeded(
                lease_token=self.lease_token,
                adapter_files=adapter_files,
                result_file=result_file,
                trained_tokens=self._tokens_before + self._trained_tokens,
            )
        )

    @property
    def file_in_use(self) -> DatasetName:
        """The file whose rows are on the device."""
        return "training" if self._evaluation is None else "validation"

    def log(self, name: str, **details: str | float | None) -> None:
        """Write a line into the job's own log."""
        self._channel.send(JobLogged(lease_token=self.lease_token, name=name, details=details))

    def close(self) -> None:
        """Remove the job's files. What it still does in the background ends at its next chunk, row or wait."""
        self._is_closed = True
        self._channel.refuse_urls(self.lease_token)
        self._scratch.cleanup()

    def _check_wanted(self) -> None:
        if self._is_closed:
            raise JobStoppedError("The job was stopped.")

    def _dataset_path(self, name: str) -> Path:
        return self._directory / f"{name}.jsonl"

    def _tokenize(self, name: DatasetName) -> TokenizedDataset:
        started = time.monotonic()
        path = self._dataset_path(name)
        size_bytes = path.stat().st_size
        max_seq_len = self._order.spec.max_seq_len
        # Whoever is closed meanwhile need not go on: its datasets are dropped, whole or not.
        examples = itertools.takewhile(lambda _: not self._is_closed, read_examples(path, file=name))
        dataset = tokenize_dataset(
            self._base.tokenizer, examples, max_seq_len=max_seq_len, file=name, now=self._created_at
        )
        path.unlink()
        self.log(
            "dataset.tokenized",
            file=name,
            size_bytes=size_bytes,
            num_tokens=sum(example.num_tokens for example in dataset.examples),
            **dataset.counts.model_dump(),
            seconds=round(time.monotonic() - started, 3),
        )
        return dataset

    @property
    def _created_at(self) -> dt.datetime:
        """The date that a template writes: every attempt of a job trains on the same rows."""
        return dt.datetime.fromtimestamp(self._order.facts.created_at)  # noqa: DTZ006 (the local time)

    def _restore(self, engine: Engine, point: FetchedPoint) -> int:
        """Return the step from which the slot goes on."""
        try:
            step = engine.load_state(str(self.lease_token), point.directory)
        except InvalidJobError as error:
            self._warn(f"{error} The job starts from its first step.")
            return 0
        finally:
            shutil.rmtree(point.directory)
        self._rows = list(point.progress.rows)
        self._tokens_before = point.progress.trained_tokens
        self._is_epoch_open = point.progress.is_epoch_open
        return step

    def _end_epoch(self, engine: Engine) -> None:
        self.bill()
        if not self._rows and self._is_last_step_taken:
            raise DivergedError("The gradient was not finite in any step. Lower the learning rate.")
        if not self._rows or self._checkpoint_directory.exists():
            return  # every step of the epoch was skipped: there is nothing new to judge or to store
        self._is_epoch_open = True
        if self._validation is not None:
            self._evaluation = Phase("evaluate")
            engine.begin_evaluation(str(self.lease_token), self._validation.examples)
        else:
            self._publish_epoch(engine)

    def _publish_epoch(self, engine: Engine) -> None:
        if not self._has_room_for_checkpoint():
            self._rest(engine)
            return
        self._save_checkpoint(engine)
        self._is_epoch_open = False
        if not self._is_last_step_taken and self._pace.is_free:
            self.save_resume_point(engine)

    def _has_room_for_checkpoint(self) -> bool:
        """Remove what is stored and not the newest. At most the newest may be left beside the one to come."""
        while len(self._checkpoints) > 1 and self._checkpoints[0].upload.done():
            shutil.rmtree(self._checkpoints.pop(0).directory)
        return len(self._checkpoints) <= 1

    def _rest(self, engine: Engine) -> None:
        """Wait in the slot for the oldest upload, while the device is the other jobs'."""
        self.awaited_upload = self._checkpoints[0].upload
        engine.rest(str(self.lease_token))
        self.log("checkpoint.delayed", step=self._rows[-1].step)

    def _store_resume_point(self, state: SlotState, progress: Progress, earlier: tuple[Future[None], ...]) -> None:
        directory = self._directory / f"resume-{state.step}"
        artifact = f"resume/step-{state.step}"
        try:
            write_resume_point(directory, state, progress)
            files = self._upload(artifact, directory, RESUME_FILES)
        except (TransferError, OSError, SafetensorError) as error:
            self._warn(f"The resume point of step {state.step} could not be stored: {error}")
            return
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        self._stored_step = state.step
        wait(earlier)  # a checkpoint of this step or before is told of first
        self._channel.send(
            ResumePointSaved(lease_token=self.lease_token, step=state.step, artifact=artifact, files=files)
        )

    def _take_update(self, update: StepMetrics) -> None:
        self._is_last_step_taken = update.is_last
        self._trained_tokens += update.num_tokens
        if update.is_skipped:
            total_steps = update.total_steps
            self._channel.send(StepSkipped(lease_token=self.lease_token, step=update.step, total_steps=total_steps))
        else:
            self._report_step(update)

    def _report_step(self, update: StepMetrics) -> None:
        self._rows.append(ResultRow(update.step, update.loss, update.token_accuracy))
        self._channel.send(
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

    def _take_evaluation(self, result: Evaluation) -> None:
        if self._evaluation is not None:
            self._report_phase(self._evaluation)
            self._evaluation = None
        self._rows[-1].valid_loss = result.loss
        self._rows[-1].valid_mean_token_accuracy = result.token_accuracy
        self._channel.send(
            EvaluationDone(
                lease_token=self.lease_token,
                step=self._rows[-1].step,
                loss=result.loss,
                token_accuracy=result.token_accuracy,
            )
        )

    def _save_checkpoint(self, engine: Engine) -> None:
        """Write the adapter as it is now; its inspection and its upload go on in the background."""
        directory = self._checkpoint_directory
        export = Phase("export")
        directory.mkdir()
        engine.export_adapter(str(self.lease_token), directory)
        metrics = self._last_metrics()
        earlier = tuple(self._uploads)
        upload = self._channel.run_in_background(lambda: self._publish_checkpoint(directory, metrics, earlier, export))
        self._uploads.append(upload)
        self._checkpoints.append(LocalCheckpoint(directory, upload))

    def _publish_checkpoint(
        self, directory: Path, metrics: dict[str, float], earlier: tuple[Future[None], ...], export: Phase
    ) -> None:
        step = int(metrics["step"])
        artifact = f"checkpoints/step-{step}"
        self._inspect_adapter(step, directory, metrics)
        self._report_phase(export)
        try:
            files = self._upload(artifact, directory, ADAPTER_FILES)
            wait(earlier)  # they are listed in the order in which they are told of
        except TransferError as error:
            self._warn(f"The checkpoint of step {step} could not be stored: {error}")
            return
        self._channel.send(
            CheckpointSaved(lease_token=self.lease_token, step=step, artifact=artifact, files=files, metrics=metrics)
        )

    def _inspect_adapter(self, step: int, directory: Path, metrics: dict[str, float]) -> None:
        facts = self._order.facts.model_copy(update={"base_revision": self._base.revision})
        validation_file = self._order.validation_file
        provenance = Provenance(
            facts=facts,
            spec=self._order.spec,
            training_sha256=self._order.training_file.sha256,
            validation_sha256=validation_file.sha256 if validation_file else None,
            step=step,
            metrics=metrics,
        )
        describe_adapter(directory, provenance)
        verify_adapter(
            directory,
            adapter=self._order.spec.adapter,
            base_model_id=facts.base_model_id,
            base_config=self._base.model.config,
        )

    def _upload_last(self, artifact: str, directory: Path, names: tuple[str, ...]) -> tuple[StoredFile, ...]:
        try:
            return self._upload(artifact, directory, names)
        except TransferError as error:
            raise type(error)(f"The {artifact} could not be stored: {error}") from error

    def _upload(self, artifact: str, directory: Path, names: tuple[str, ...]) -> tuple[StoredFile, ...]:
        phase = Phase("upload")
        stored = self._upload_files(UrlsWanted(lease_token=self.lease_token, artifact=artifact, names=names), directory)
        size_bytes = sum(file.size_bytes for file in stored)
        done = self._report_phase(phase, artifact=artifact, size_bytes=size_bytes)
        self.log("artifact.uploaded", artifact=artifact, size_bytes=size_bytes, seconds=round(done.seconds, 3))
        return stored

    def _upload_files(self, wanted: UrlsWanted, directory: Path) -> tuple[StoredFile, ...]:
        """Store files one after another. URLs that are refused, as after a long upload, are asked for anew."""
        urls = self._channel.request_urls(wanted, check=self._check_wanted)
        stored: list[StoredFile] = []
        num_refusals = 0
        while len(stored) < len(wanted.names):
            name = wanted.names[len(stored)]
            try:
                stored.append(upload(urls[name], directory / name, self._patience))
            except UrlRefusedError:
                num_refusals += 1
                if num_refusals > _MAX_URL_REFUSALS:
                    raise
                urls = self._channel.request_urls(wanted, check=self._check_wanted)
        return tuple(stored)

    def _report_phase(self, phase: Phase, *, artifact: str | None = None, size_bytes: int = 0) -> PhaseDone:
        done = phase.end(self.lease_token, artifact=artifact, size_bytes=size_bytes)
        self._channel.send(done)
        return done

    @property
    def _checkpoint_directory(self) -> Path:
        """Where the adapter is written as its last good step has left it."""
        return self._directory / f"step-{self._rows[-1].step}"

    def _last_metrics(self) -> dict[str, float]:
        row = self._rows[-1]
        metrics = {"step": float(row.step), "train_loss": row.train_loss, "train_accuracy": row.train_accuracy}
        if row.valid_loss is not None and row.valid_mean_token_accuracy is not None:
            metrics |= {"valid_loss": row.valid_loss, "valid_mean_token_accuracy": row.valid_mean_token_accuracy}
        return metrics

    def _warn(self, message: str) -> None:
        self._channel.send(JobWarned(lease_token=self.lease_token, message=message))
