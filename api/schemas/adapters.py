"""Adapters: the trained LoRA weights, their shape, and the answers that hand out their files."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError

from api.schemas.wire import Answer, unix_seconds
from core.domain.ids import IdKind, format_id
from core.domain.training import AdapterConfig, Quantization
from core.domain.values import StoredArtifact, StoredFile
from core.services.adapters import TrainedAdapter

# Shown for an adapter whose stored configuration cannot be read, so that the rest of the list is shown all the same.
UNREADABLE_CONFIG = AdapterConfig.model_construct(rank=0, alpha=0.0, target_modules=())


def read_adapter_config(stored: Any) -> AdapterConfig:
    try:
        return AdapterConfig.model_validate(stored)
    except ValidationError:
        return UNREADABLE_CONFIG


class AdapterConfigObject(Answer):
    """The shape of a LoRA adapter, with every default resolved."""

    rank: int
    """The rank of the adapter's matrices."""
    alpha: float
    """LoRA's alpha. The adapter's output is scaled by alpha / rank, or by alpha / sqrt(rank) with rsLoRA."""
    dropout: float
    """The probability with which an input of the adapter is dropped in training."""
    target_modules: tuple[str, ...]
    """The modules that the adapter trains, by the last part of their names, such as `q_proj`."""
    use_rslora: bool
    """Whether the scale is that of rsLoRA."""

    @classmethod
    def of(cls, config: AdapterConfig) -> AdapterConfigObject:
        return cls.model_validate(config, from_attributes=True)


class AdapterFile(Answer):
    """One file of an adapter."""

    name: str
    """The file's name, such as `adapter_model.safetensors`."""
    size_bytes: int
    """The file's size in bytes."""
    sha256: str
    """The SHA-256 of the file's bytes, in hexadecimal digits."""

    @classmethod
    def of(cls, file: StoredFile) -> AdapterFile:
        return cls(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256)


class AdapterObject(Answer):
    """A finished adapter: what a server must be started with to serve it, and the files that there are to download."""

    id: str
    """The adapter's id, which begins with `adapter-`."""
    object: Literal["adapter"] = "adapter"
    """The kind of this object."""
    created_at: int
    """When the adapter was stored, in Unix seconds."""
    name: str
    """The fine-tuned model's name, `ft:<base>:<tenant>:<suffix>:<digits>`."""
    base_model: str
    """The base model that the adapter was trained against."""
    quantization: Quantization | None
    """The quantization of the base in training. Null for full precision."""
    rank: int
    """The rank of the adapter's matrices."""
    alpha: float
    """LoRA's alpha. The adapter's output is scaled by alpha / rank, or by alpha / sqrt(rank) with rsLoRA."""
    use_rslora: bool
    """Whether the adapter is scaled by alpha / sqrt(rank)."""
    target_modules: list[str]
    """The modules that the adapter trains."""
    fine_tuning_job_id: str
    """The id of the job that trained the adapter."""
    size_bytes: int
    """The size of all files together, in bytes."""
    files: list[AdapterFile]
    """The adapter's files."""

    @classmethod
    def of(cls, trained: TrainedAdapter) -> AdapterObject:
        row, config = trained.row, read_adapter_config(trained.config)
        return cls(
            id=format_id(IdKind.ADAPTER, row.id),
            created_at=unix_seconds(row.created_at),
            name=row.name,
            base_model=row.base_model_id,
            quantization=trained.quantization,
            rank=config.rank,
            alpha=config.alpha,
            use_rslora=config.use_rslora,
            target_modules=list(config.target_modules),
            fine_tuning_job_id=format_id(IdKind.JOB, row.job_id),
            size_bytes=row.size_bytes,
            files=[AdapterFile.of(file) for file in StoredArtifact.of_row(row.object_prefix, row.files).files],
        )


class DownloadFile(AdapterFile):
    """One file of an adapter, and where to download it."""

    url: str
    """A presigned URL of the object store. It needs no API key."""

    @classmethod
    def at(cls, url: str, file: StoredFile) -> DownloadFile:
        return cls(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256, url=url)


class DownloadObject(Answer):
    """Where the files of an adapter or of a checkpoint can be downloaded for a while."""

    id: str
    """The id of the adapter or of the checkpoint."""
    object: Literal["adapter.download", "checkpoint.download"] = "adapter.download"
    """What the files are of: `adapter.download` for a finished adapter, `checkpoint.download` for a checkpoint."""
    expires_at: int
    """When the URLs stop working, in Unix seconds."""
    files: list[DownloadFile]
    """The files, each with its URL."""
