"""The body of a job's creation: OpenAI's fields and bounds, ours beside them; unknown fields are refused."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from api.schemas.misplaced import find_misplaced
from core.domain import bounds
from core.domain.errors import InvalidRequestError, NotFoundError
from core.domain.ids import IdKind, parse_id
from core.domain.job_requests import JobRequest
from core.domain.training import LearningRateSchedule, resolve_alpha

Auto = Literal["auto"]
# PostgreSQL stores no NUL; half surrogate pairs are refused by pydantic itself.
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
MetadataKey = Annotated[Text, StringConstraints(max_length=64)]
MetadataValue = Annotated[Text, StringConstraints(max_length=512)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=False)


class Hyperparameters(_Body):
    n_epochs: Auto | Annotated[int, bounds.EPOCHS.field] = "auto"
    batch_size: Auto | Annotated[int, bounds.BATCH_SIZE.field] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, bounds.LEARNING_RATE_MULTIPLIER.field] = "auto"


class Supervised(_Body):
    hyperparameters: Hyperparameters | None = None


class Method(_Body):
    """The union of methods. Whatever has another `type` than ours is refused by that name, its own fields unread."""

    model_config = ConfigDict(extra="allow")
    type: Text
    supervised: Supervised | None = None


class AdapterBody(_Body):
    rank: int = 16  # its bounds are the base's
    alpha: Annotated[float, bounds.ALPHA.field] | None = None  # twice the rank
    dropout: Annotated[float, bounds.DROPOUT.field] = 0.0
    target_modules: Literal["all-linear"] | list[Text] = "all-linear"
    use_rslora: bool = False


class CreateJob(_Body):
    model: Text
    training_file: Text
    validation_file: Text | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] | None = None
    seed: Annotated[int, bounds.SEED.field] | None = None
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)
    integrations: list[Any] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    adapter: AdapterBody = AdapterBody()
    quantization: Literal["nf4"] | None = None
    priority: Annotated[int, bounds.PRIORITY.field] = 0
    max_seq_len: Annotated[int, bounds.SEQ_LEN.field] | None = None
    learning_rate: Annotated[float, bounds.LEARNING_RATE.field] | None = None
    learning_rate_schedule: LearningRateSchedule = "cosine"
    warmup_ratio: Annotated[float, bounds.WARMUP_RATIO.field] = 0.05
    weight_decay: Annotated[float, bounds.WEIGHT_DECAY.field] = 0.0
    max_grad_norm: Annotated[float, bounds.GRAD_NORM.field] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _point_to_the_right_place(cls, body: Any) -> Any:
        """Refuse a field that belongs elsewhere by its right name, before it is only unknown."""
        if isinstance(body, Mapping) and (misplaced := find_misplaced(_without_other_method(body), cls)) is not None:
            sent, right = misplaced
            where = ", at the top of the request" if "." in sent and "." not in right else ""
            raise InvalidRequestError(f"`{sent}` is called `{right}` here{where}.", param=sent)
        return body

    def to_request(self) -> JobRequest:
        """Return the service's request, with None for every "auto". Raises InvalidRequestError for other methods."""
        self._check_integrations()
        numbers = self._hyperparameters()
        self._check_rates(numbers)
        validation_id = None
        if self.validation_file is not None:
            validation_id = _parse_file_id(self.validation_file, param="validation_file")
        return JobRequest(
            base_model_id=self.model,
            training_file_id=_parse_file_id(self.training_file, param="training_file"),
            validation_file_id=validation_id,
            suffix=self.suffix,
            seed=self.seed,
            metadata=self.metadata or {},
            priority=self.priority,
            quantization=self.quantization,
            n_epochs=None if numbers.n_epochs == "auto" else numbers.n_epochs,
            batch_size=None if numbers.batch_size == "auto" else numbers.batch_size,
            learning_rate_multiplier=(
                None if numbers.learning_rate_multiplier == "auto" else numbers.learning_rate_multiplier
            ),
            learning_rate=self.learning_rate,
            learning_rate_schedule=self.learning_rate_schedule,
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            max_seq_len=self.max_seq_len,
            rank=self.adapter.rank,
            # A default that is spelled out is the same request.
            alpha=None if self.adapter.alpha == resolve_alpha(self.adapter.rank) else self.adapter.alpha,
            dropout=self.adapter.dropout,
            target_modules=(
                "all-linear" if self.adapter.target_modules == "all-linear" else tuple(self.adapter.target_modules)
            ),
            use_rslora=self.adapter.use_rslora,
        )

    def _check_integrations(self) -> None:
        if self.integrations:
            raise InvalidRequestError(
                "Integrations are not supported. Leave them out, or read the job's events and metrics.",
                code="unsupported_integration",
                param="integrations",
            )

    def _check_rates(self, numbers: Hyperparameters) -> None:
        if self.learning_rate is not None and numbers.learning_rate_multiplier != "auto":
            raise InvalidRequestError(
                "`learning_rate` and `learning_rate_multiplier` say the same thing: give one of them.",
                param="learning_rate",
            )

    def _hyperparameters(self) -> Hyperparameters:
        if self.method is None:
            return self.hyperparameters or Hyperparameters()
        if self.method.type != "supervised":
            raise InvalidRequestError(
                f"The method {self.method.type[:50]!r} is not supported yet; use 'supervised'.",
                code="unsupported_method",
                param="method.type",
            )
        if self.method.model_extra:
            name = next(iter(self.method.model_extra))
            raise InvalidRequestError(f"A supervised method has no field {name[:50]!r}.", param="method")
        chosen = self.method.supervised and self.method.supervised.hyperparameters
        if chosen is not None and self.hyperparameters is not None:
            raise InvalidRequestError(
                "Give hyperparameters in `method` or at the top, not both.", param="hyperparameters"
            )
        return chosen or self.hyperparameters or Hyperparameters()


def _without_other_method(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out the fields of a method that is not ours: it is refused by its name."""
    method = body.get("method")
    if isinstance(method, Mapping) and method.get("type") != "supervised":
        return {name: value for name, value in body.items() if name != "method"}
    return body


def _parse_file_id(text: str, *, param: str) -> uuid.UUID:
    """Return a file's UUID. Raises for what is no id what `submit_job` raises for an unknown one."""
    try:
        return parse_id(IdKind.FILE, text, param=param)
    except NotFoundError as error:
        raise InvalidRequestError(error.message, code="file_not_found", param=param) from error
