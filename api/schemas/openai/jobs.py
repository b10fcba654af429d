"""A fine-tuning job as OpenAI's API shows it, with our fields beside OpenAI's. Times are Unix seconds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, with_config
from typing_extensions import TypedDict

from api.schemas.adapters import UNREADABLE_CONFIG, AdapterConfigObject
from api.schemas.openai.integrations import Integrations
from api.schemas.wire import STORED, Answer, AsStored, optional_seconds, unix_seconds
from core.db.models import Job
from core.domain.ids import IdKind, format_id
from core.domain.jobs import JobStatus
from core.domain.progress import Estimate, measure_progress
from core.domain.training import Quantization, TrainingSpec

# Shown for a job whose stored terms cannot be read, so that its tenant's other jobs are listed all the same.
_UNREADABLE = TrainingSpec.model_construct(
    adapter=UNREADABLE_CONFIG,
    n_epochs=0,
    batch_size=0,
    learning_rate=0.0,
    learning_rate_multiplier=0.0,
    max_seq_len=0,
    seed=0,
)


class IntervalObject(Answer):
    """The times between which the job may end: if every step took as long as its fastest, or its slowest, stretch."""

    earliest: int
    """The earliest time, in Unix seconds."""
    latest: int
    """The latest time, in Unix seconds."""

    @classmethod
    def of(cls, estimate: Estimate) -> IntervalObject:
        return cls(earliest=unix_seconds(estimate.interval.earliest), latest=unix_seconds(estimate.interval.latest))


class DatasetCounts(Answer, extra="forbid"):
    """What became of the rows of one file when they were read."""

    num_examples: int
    """The rows that are used."""
    num_truncated: int
    """The rows that lost their tail, because they are longer than `max_seq_len`."""
    num_dropped: int
    """The rows that are left out, because nothing in them can be learnt."""
    num_left_out_turns: int
    """The answers that stay out of the loss, because the base's chat template would not ask for them as they stand."""


class DatasetsObject(Answer):
    """What became of the rows of a job's files."""

    training: DatasetCounts
    """The rows of the training file."""
    validation: DatasetCounts | None
    """The rows of the validation file. Null if the job has none."""


class JobHyperparameters(Answer):
    """OpenAI's hyperparameters, with every `auto` resolved to a number."""

    n_epochs: int
    """The number of passes over the training file."""
    batch_size: int
    """The number of examples of one optimizer step."""
    learning_rate_multiplier: float
    """The factor on the service's base learning rate of 2e-4."""


class SupervisedMethod(Answer):
    """Supervised fine-tuning, with its hyperparameters."""

    hyperparameters: JobHyperparameters
    """The hyperparameters, the same as the job's own."""


class JobMethod(Answer):
    """The training method."""

    type: Literal["supervised"] = "supervised"
    """The kind of method."""
    supervised: SupervisedMethod
    """The terms of supervised fine-tuning."""


@with_config(STORED)
class JobError(TypedDict):
    """Why a job has failed."""

    code: str
    """The reason's stable word for programs, such as `nothing_to_learn`.

    The list of error codes is in docs/errors.md and may grow.
    """
    message: str
    """The reason, for people."""
    param: str | None
    """The field of the request that names the file at fault, such as `training_file`. Null if no file is."""


class JobObject(Answer):
    """A fine-tuning job."""

    id: str
    """The job's id, which begins with `ftjob-`."""
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    """The kind of this object."""
    created_at: int
    """When the job was submitted, in Unix seconds."""
    model: str
    """The base model that the job trains against."""
    organization_id: str
    """The id of the tenant that owns the job."""
    training_file: str
    """The id of the training file."""
    validation_file: str | None
    """The id of the validation file. Null if the job has none."""
    status: JobStatus
    """Where the job is in its life."""
    fine_tuned_model: str | None
    """The name of the trained model. Null until the job has succeeded."""
    finished_at: int | None
    """When the job succeeded, failed or was cancelled, in Unix seconds. Null until then."""
    estimated_finish: int | None
    """When the job may end, in Unix seconds. Null if too few steps were measured, or the job does not run."""
    estimated_finish_interval: IntervalObject | None
    """Ours. How far off `estimated_finish` may be. Null if `estimated_finish` is."""
    progress: float
    """Ours. How much of the job is done, from 0 to 1."""
    hyperparameters: JobHyperparameters
    """The hyperparameters, resolved."""
    method: JobMethod
    """The training method and its terms."""
    result_files: list[str]
    """The id of the file with the step metrics as CSV. Empty until the job has succeeded."""
    integrations: Annotated[Integrations, Field(max_length=0)]
    """Always empty: integrations are not supported."""
    metadata: dict[str, str] | None
    """The labels that the request gave the job. Null if it gave none."""
    seed: int
    """The seed of all that is random in the job."""
    trained_tokens: int | None
    """The number of tokens that the job was trained on. Null until the job has succeeded."""
    error: Annotated[JobError, AsStored()] | None
    """Why the job has failed. Null if it has not."""
    suffix: str | None
    """Ours. The part of the model's name that the request chose. Null if it chose none."""
    adapter: AdapterConfigObject
    """Ours. The shape of the adapter."""
    quantization: Quantization | None
    """Ours. The quantization of the base in training. Null for full precision."""
    priority: int
    """Ours. The job's rank among the tenant's own jobs: a higher one starts first."""
    max_seq_len: int
    """Ours. The number of tokens to which longer rows are cut."""
    learning_rate: float
    """Ours. The peak learning rate."""
    total_steps: int
    """Ours. The number of optimizer steps. An estimate until the files are read, because rows may be dropped."""
    trained_steps: int
    """Ours. The number of steps done, the skipped ones included."""
    skipped_steps: int
    """Ours. The number of steps that changed nothing, because their gradient was not finite."""
    datasets: DatasetsObject | None
    """Ours. What became of the rows of the files. Null until an attempt has read them."""
    is_pausing: bool
    """Ours. Whether a pause was asked for. The job runs until its worker has stored where it stands."""

    @classmethod
    def of(cls, row: Job, *, estimate: Estimate | None = None) -> JobObject:
        spec = _read_spec(row.spec)
        shown = JobHyperparameters(
            n_epochs=spec.n_epochs,
            batch_size=spec.batch_size,
            learning_rate_multiplier=spec.learning_rate_multiplier,
        )
        return cls(
            id=format_id(IdKind.JOB, row.id),
            created_at=unix_seconds(row.created_at),
            model=row.base_model_id,
            organization_id=format_id(IdKind.TENANT, row.tenant_id),
            training_file=format_id(IdKind.FILE, row.training_file_id),
            validation_file=format_id(IdKind.FILE, row.validation_file_id) if row.validation_file_id else None,
            status=row.status,
            fine_tuned_model=row.fine_tuned_model,
            finished_at=optional_seconds(row.finished_at),
            estimated_finish=unix_seconds(estimate.finish_at) if estimate else None,
            estimated_finish_interval=IntervalObject.of(estimate) if estimate else None,
            progress=measure_progress(row.status, trained_steps=row.trained_steps, total_steps=row.total_steps),
            hyperparameters=shown,
            method=JobMethod(supervised=SupervisedMethod(hyperparameters=shown)),
            result_files=[format_id(IdKind.FILE, row.result_file_id)] if row.result_file_id else [],
            integrations=[],
            metadata=row.job_metadata or None,
            seed=spec.seed,
            trained_tokens=row.trained_tokens,
            error=row.error,
            suffix=row.suffix,
            adapter=AdapterConfigObject.of(spec.adapter),
            quantization=row.quantization,
            priority=row.priority,
            max_seq_len=spec.max_seq_len,
            learning_rate=spec.learning_rate,
            total_steps=row.total_steps,
            trained_steps=row.trained_steps,
            skipped_steps=row.skipped_steps,
            datasets=_read_datasets(row.datasets),
            is_pausing=row.pause_requested_at is not None,
        )


def _read_spec(stored: dict[str, Any]) -> TrainingSpec:
    try:
        return TrainingSpec.model_validate(stored)
    except ValidationError:
        return _UNREADABLE


def _read_datasets(stored: dict[str, Any] | None) -> DatasetsObject | None:
    try:
        return DatasetsObject.model_validate(stored) if stored else None
    except ValidationError:
        return None
