"""Answers: rows as the objects of OpenAI's API. Times are Unix seconds."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from core.db.models import BaseModelRow, Checkpoint, Event, File, Job
from core.domain.dataset_counts import DatasetCounts
from core.domain.ids import IdKind, format_id
from core.domain.progress import Estimate, measure_progress
from core.domain.training import AdapterConfig, TrainingSpec
from core.domain.values import Page
from core.services.adapters import TrainedAdapter
from core.services.streams import MissedEvent

T = TypeVar("T")
R = TypeVar("R")


class ListObject(BaseModel, Generic[T]):
    object: str = "list"
    data: list[T]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class FileSummary(BaseModel):
    """A file as it is listed: `validation` counts what is wrong, the file itself tells it row by row."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None
    num_examples: int
    sha256: str
    validation: dict[str, Any]

    @classmethod
    def of(cls, row: File) -> FileSummary:
        return cls(**_describe_file(row))


class FileObject(FileSummary):
    problems: list[dict[str, Any]]

    @classmethod
    def of(cls, row: File) -> FileObject:
        return cls(**_describe_file(row), problems=row.problems)


class DeletedObject(BaseModel):
    id: str
    object: str
    deleted: bool = True


class IntervalObject(BaseModel):
    """What the fastest and the slowest stretch of the job's last steps would give."""

    earliest: int
    latest: int


# What is shown of a job whose stored terms cannot be read: the other jobs of its tenant's list are shown all the same.
_UNREADABLE = TrainingSpec.model_construct(
    adapter=AdapterConfig.model_construct(rank=0, alpha=0.0, target_modules=()),
    n_epochs=0,
    batch_size=0,
    learning_rate=0.0,
    learning_rate_multiplier=0.0,
    max_seq_len=0,
    seed=0,
)


def _read_spec(stored: dict[str, Any]) -> TrainingSpec:
    try:
        return TrainingSpec.model_validate(stored)
    except ValidationError:
        return _UNREADABLE


class DatasetsObject(BaseModel):
    """What became of the rows of a job's files."""

    training: DatasetCounts
    validation: DatasetCounts | None


def _read_datasets(stored: dict[str, Any] | None) -> DatasetsObject | None:
    try:
        return DatasetsObject.model_validate(stored) if stored else None
    except ValidationError:
        return None


def _read_adapter(stored: Any) -> AdapterConfig:
    try:
        return AdapterConfig.model_validate(stored)
    except ValidationError:
        return _UNREADABLE.adapter


class JobObject(BaseModel):
    """A job as OpenAI shows it, and what is ours.

    `total_steps` is an estimate until an attempt has read the files: rows may be dropped. `trained_steps` counts the
    `skipped_steps` too, which changed nothing. `datasets` is null until the files are read. A job that `is_pausing`
    runs until its worker has stored where it stands.
    """

    id: str
    object: str = "fine_tuning.job"
    created_at: int
    model: str
    organization_id: str
    training_file: str
    validation_file: str | None
    status: str
    fine_tuned_model: str | None
    finished_at: int | None
    estimated_finish: int | None
    estimated_finish_interval: IntervalObject | None
    progress: float
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    result_files: list[str]
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    seed: int
    trained_tokens: int | None
    error: dict[str, Any] | None
    suffix: str | None
    adapter: dict[str, Any]
    quantization: str | None
    priority: int
    max_seq_len: int
    learning_rate: float
    total_steps: int
    trained_steps: int
    skipped_steps: int
    datasets: DatasetsObject | None
    is_pausing: bool

    @classmethod
    def of(cls, row: Job, *, estimate: Estimate | None = None) -> JobObject:
        spec = _read_spec(row.spec)
        shown = {
            "n_epochs": spec.n_epochs,
            "batch_size": spec.batch_size,
            "learning_rate_multiplier": spec.learning_rate_multiplier,
        }
        return cls(
            id=format_id(IdKind.JOB, row.id),
            created_at=_seconds(row.created_at),
            model=row.base_model_id,
            organization_id=format_id(IdKind.TENANT, row.tenant_id),
            training_file=format_id(IdKind.FILE, row.training_file_id),
            validation_file=_optional_id(IdKind.FILE, row.validation_file_id),
            status=row.status,
            fine_tuned_model=row.fine_tuned_model,
            finished_at=_seconds(row.finished_at) if row.finished_at else None,
            estimated_finish=_seconds(estimate.finish_at) if estimate else None,
            estimated_finish_interval=_interval(estimate) if estimate else None,
            progress=measure_progress(row.status, trained_steps=row.trained_steps, total_steps=row.total_steps),
            hyperparameters=shown,
            method={"type": "supervised", "supervised": {"hyperparameters": shown}},
            result_files=[format_id(IdKind.FILE, row.result_file_id)] if row.result_file_id else [],
            integrations=[],
            metadata=row.job_metadata or None,
            seed=spec.seed,
            trained_tokens=row.trained_tokens,
            error=row.error,
            suffix=row.suffix,
            adapter=spec.adapter.model_dump(mode="json"),
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


class EventObject(BaseModel):
    id: str
    object: str = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None

    @classmethod
    def of(cls, row: Event | MissedEvent) -> EventObject:
        return cls(
            id=format_id(IdKind.EVENT, row.id),
            created_at=_seconds(row.created_at),
            level=row.level,
            message=row.message,
            type=row.type,
            data=row.details,
        )


class CheckpointObject(BaseModel):
    id: str
    object: str = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]

    @classmethod
    def of(cls, row: Checkpoint) -> CheckpointObject:
        metrics = {
            "step": row.metrics.get("step"),
            "train_loss": row.metrics.get("train_loss"),
            "train_mean_token_accuracy": row.metrics.get("train_accuracy"),
            "full_valid_loss": row.metrics.get("valid_loss"),
            "full_valid_mean_token_accuracy": row.metrics.get("valid_mean_token_accuracy"),
        }
        return cls(
            id=format_id(IdKind.CHECKPOINT, row.id),
            created_at=_seconds(row.created_at),
            fine_tuning_job_id=format_id(IdKind.JOB, row.job_id),
            fine_tuned_model_checkpoint=row.model_name,
            step_number=row.step,
            metrics={name: value for name, value in metrics.items() if value is not None},
        )


class ModelObject(BaseModel):
    """What OpenAI says of a model, first and as it says it; what is known here beyond that follows."""

    id: str
    object: str = "model"
    created: int
    owned_by: str


class BaseModelObject(ModelObject):
    """A base, and what may be asked of it: a submission within these bounds is not refused for its base's sake."""

    quantizations: list[str]
    max_rank: int
    max_seq_len: int
    target_modules: list[str]
    methods: list[Literal["supervised"]]
    license: str | None

    @classmethod
    def of(cls, row: BaseModelRow) -> BaseModelObject:
        return cls(
            id=row.id,
            created=_seconds(row.created_at),
            owned_by="espalier",
            quantizations=row.quantizations,
            max_rank=row.max_rank,
            max_seq_len=row.max_seq_len,
            target_modules=row.target_modules,
            methods=["supervised"],
            license=row.license,
        )


class FineTunedModelObject(ModelObject):
    """A fine-tuned model or a checkpoint. A checkpoint's rank is its job's, which another tenant's is not shown."""

    base_model: str
    rank: int | None

    @classmethod
    def of_adapter(cls, trained: TrainedAdapter) -> FineTunedModelObject:
        row = trained.row
        owner = format_id(IdKind.TENANT, row.tenant_id)
        return cls(
            id=row.name,
            created=_seconds(row.created_at),
            owned_by=owner,
            base_model=row.base_model_id,
            rank=_read_adapter(trained.config).rank,
        )

    @classmethod
    def of_checkpoint(cls, row: Checkpoint) -> FineTunedModelObject:
        owner = format_id(IdKind.TENANT, row.tenant_id)
        base_model = row.model_name.split(":")[1]  # a base's id has no colon
        return cls(
            id=row.model_name, created=_seconds(row.created_at), owned_by=owner, base_model=base_model, rank=None
        )


class AdapterFile(BaseModel):
    name: str
    size_bytes: int
    sha256: str


class AdapterObject(BaseModel):
    """A finished adapter: what a server must be started with to serve it, and what there is to download."""

    id: str
    object: str = "adapter"
    created_at: int
    name: str
    base_model: str
    quantization: str | None
    rank: int
    alpha: float
    use_rslora: bool
    target_modules: list[str]
    fine_tuning_job_id: str
    size_bytes: int
    files: list[AdapterFile]

    @classmethod
    def of(cls, trained: TrainedAdapter) -> AdapterObject:
        row, config = trained.row, _read_adapter(trained.config)
        return cls(
            id=format_id(IdKind.ADAPTER, row.id),
            created_at=_seconds(row.created_at),
            name=row.name,
            base_model=row.base_model_id,
            quantization=trained.quantization,
            rank=config.rank,
            alpha=config.alpha,
            use_rslora=config.use_rslora,
            target_modules=list(config.target_modules),
            fine_tuning_job_id=format_id(IdKind.JOB, row.job_id),
            size_bytes=row.size_bytes,
            files=[AdapterFile(**file) for file in row.files],
        )


class DownloadFile(AdapterFile):
    url: str


class DownloadObject(BaseModel):
    id: str
    object: str = "adapter.download"
    expires_at: int
    files: list[DownloadFile]


def as_list(page: Page[R], convert: Callable[[R], Any]) -> ListObject[Any]:
    """Return a page as OpenAI's list object; the client's next cursor is the last item's id."""
    data = [convert(row) for row in page.items]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return ListObject(data=data, has_more=page.has_more, first_id=first_id, last_id=last_id)


def _describe_file(row: File) -> dict[str, Any]:
    return {
        "id": format_id(IdKind.FILE, row.id),
        "bytes": row.size_bytes,
        "created_at": _seconds(row.created_at),
        "expires_at": _seconds(row.expires_at) if row.expires_at else None,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": row.status,
        "status_details": row.status_details,
        "num_examples": row.num_examples,
        "sha256": row.sha256,
        "validation": row.report,
    }


def _seconds(instant: dt.datetime) -> int:
    return int(instant.timestamp())


def _optional_id(kind: IdKind, value: uuid.UUID | None) -> str | None:
    return None if value is None else format_id(kind, value)


def _interval(estimate: Estimate) -> IntervalObject:
    earliest, latest = estimate.interval.earliest, estimate.interval.latest
    return IntervalObject(earliest=_seconds(earliest), latest=_seconds(latest))
