"""Models: the base models that a tenant may train against, and its own fine-tuned models and checkpoints."""

from __future__ import annotations

from typing import Literal

from api.schemas.adapters import read_adapter_config
from api.schemas.wire import Answer, unix_seconds
from core.db.models import BaseModelRow, Checkpoint
from core.domain.ids import IdKind, format_id
from core.domain.training import Quantization
from core.services.adapters import TrainedModel


class ModelObject(Answer):
    """What OpenAI's API says of a model. Our fields follow behind it."""

    id: str
    """The model's name, as a request names it."""
    object: Literal["model"] = "model"
    """The kind of this object."""
    created: int
    """When the model was made or registered, in Unix seconds."""
    owned_by: str
    """The organization's id for a fine-tuned model, `espalier` for a base model."""


class BaseModelObject(ModelObject):
    """A base model and what may be asked of it. A job within these bounds is not refused because of its base."""

    quantizations: list[Quantization]
    """Ours. The quantizations in which the base can be trained against, besides full precision."""
    max_rank: int
    """Ours. The greatest rank that an adapter may have."""
    max_seq_len: int
    """Ours. The greatest number of tokens of a row."""
    target_modules: list[str]
    """Ours. The modules that an adapter may train, such as `q_proj`."""
    methods: list[Literal["supervised"]]
    """Ours. The training methods that the base can be used with."""
    license: str | None
    """Ours. The base's licence by its SPDX or hub identifier, such as `apache-2.0`. Null if it is not known."""

    @classmethod
    def of(cls, row: BaseModelRow) -> BaseModelObject:
        return cls(
            id=row.id,
            created=unix_seconds(row.created_at),
            owned_by="espalier",
            quantizations=row.quantizations,
            max_rank=row.max_rank,
            max_seq_len=row.max_seq_len,
            target_modules=row.target_modules,
            methods=["supervised"],
            license=row.license,
        )


class FineTunedModelObject(ModelObject):
    """A fine-tuned model or a checkpoint."""

    base_model: str
    """Ours. The base model that the adapter was trained against."""
    rank: int | None
    """Ours. The adapter's rank. Null for a checkpoint."""

    @classmethod
    def of(cls, model: TrainedModel) -> FineTunedModelObject:
        return cls(
            id=model.name,
            created=unix_seconds(model.created_at),
            owned_by=format_id(IdKind.TENANT, model.tenant_id),
            base_model=model.base_model_id,
            rank=read_adapter_config(model.config).rank,
        )

    @classmethod
    def of_checkpoint(cls, row: Checkpoint) -> FineTunedModelObject:
        """Return a checkpoint as a model. Its rank is its job's, which another tenant may not see."""
        owner = format_id(IdKind.TENANT, row.tenant_id)
        base_model = row.model_name.split(":")[1]  # a base's id has no colon
        return cls(
            id=row.model_name, created=unix_seconds(row.created_at), owned_by=owner, base_model=base_model, rank=None
        )
