"""The body of a job's submission: OpenAI's fields and bounds, and ours beside them. Unknown fields are refused."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator

from api.schemas.misplaced import find_misplaced
from api.schemas.openai.integrations import Integrations
from api.schemas.wire import RequestBody
from core.domain import bounds
from core.domain.errors import InvalidRequestError, NotFoundError
from core.domain.ids import IdKind, parse_id
from core.domain.job_requests import JobRequest
from core.domain.jobs import MAX_SUFFIX_LENGTH
from core.domain.training import LearningRateSchedule, resolve_alpha

Auto = Literal["auto"]
# PostgreSQL stores no NUL. pydantic itself refuses half surrogate pairs.
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
MetadataKey = Annotated[Text, StringConstraints(max_length=64)]
MetadataValue = Annotated[Text, StringConstraints(max_length=512)]
Suffix = Annotated[str, StringConstraints(min_length=1, max_length=MAX_SUFFIX_LENGTH, pattern=r"^[A-Za-z0-9._-]+$")]


class Hyperparameters(RequestBody):
    """OpenAI's hyperparameters. `auto` lets the service choose by the size of the training file."""

    n_epochs: Auto | Annotated[int, bounds.EPOCHS.field] = "auto"
    """The number of passes over the training file."""
    batch_size: Auto | Annotated[int, bounds.BATCH_SIZE.field] = "auto"
    """The number of examples of one optimizer step."""
    learning_rate_multiplier: Auto | Annotated[float, bounds.LEARNING_RATE_MULTIPLIER.field] = "auto"
    """The factor on the service's base learning rate of 2e-4. `auto` is 1."""


class Supervised(RequestBody):
    """The terms of supervised fine-tuning."""

    hyperparameters: Hyperparameters | None = None
    """The hyperparameters. Null or absent for `auto` everywhere."""


class Method(RequestBody):
    """The training method. Every other method than `supervised` is refused by its name, its own fields unread."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})
    type: Annotated[Text, WithJsonSchema({"type": "string", "enum": ["supervised"]})]
    """The kind of method: `supervised` only."""
    supervised: Supervised | None = None
    """The terms of supervised fine-tuning."""


class AdapterBody(RequestBody):
    """The shape of the LoRA adapter to train."""

    rank: int = 16  # its bounds are the base's
    """The rank of the adapter's matrices. At most the base model's `max_rank`."""
    alpha: Annotated[float, bounds.ALPHA.field] | None = None
    """LoRA's alpha. Null or absent for twice the rank."""
    dropout: Annotated[float, bounds.DROPOUT.field] = 0.0
    """The probability with which an input of the adapter is dropped in training."""
    target_modules: Literal["all-linear"] | list[Text] = "all-linear"
    """The modules to train, by the last part of their names, such as `q_proj`. `all-linear` is all of the base's."""
    use_rslora: bool = False
    """Whether to scale the adapter by alpha / sqrt(rank), as rsLoRA does, instead of alpha / rank."""


class CreateJob(RequestBody):
    """A job to submit: OpenAI's fields, and ours beside them."""

    model: Text
    """The base model to train against, as `GET /v1/models` names it."""
    training_file: Text
    """The id of the file to train on."""
    validation_file: Text | None = None
    """The id of the file to evaluate on. Null or absent for no evaluation."""
    suffix: Suffix | None = None
    """A part of the trained model's name, to tell it from others."""
    seed: Annotated[int, bounds.SEED.field] | None = None
    """The seed of all that is random in the job. Null or absent for a seed of the service's choice."""
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)
    """Up to 16 labels of your own. A key has at most 64 characters, a value at most 512."""
    integrations: Integrations | None = None
    """Integrations are not supported: null, absent or an empty list."""
    method: Method | None = None
    """The training method. Null or absent for `supervised`."""
    hyperparameters: Hyperparameters | None = None
    """The hyperparameters, at the place that OpenAI's API had for them before `method`."""
    adapter: AdapterBody = AdapterBody()
    """Ours. The shape of the adapter."""
    quantization: Literal["nf4"] | None = None
    """Ours. The quantization of the base in training. Null or absent for full precision."""
    priority: Annotated[int, bounds.PRIORITY.field] = 0
    """Ours. The job's rank among the organization's own jobs: a higher one starts first."""
    max_seq_len: Annotated[int, bounds.SEQ_LEN.field] | None = None
    """Ours. The number of tokens to which longer rows are cut. Null or absent for the base model's greatest."""
    learning_rate: Annotated[float, bounds.LEARNING_RATE.field] | None = None
    """Ours. The peak learning rate itself, in place of `learning_rate_multiplier`."""
    learning_rate_schedule: LearningRateSchedule = "cosine"
    """Ours. How the learning rate falls after the warm-up.

    - `linear`: It falls in a straight line.
    - `cosine`: It falls along half a cosine.
    - `constant`: It stays at its peak.
    """
    warmup_ratio: Annotated[float, bounds.WARMUP_RATIO.field] = 0.05
    """Ours. The part of the steps over which the learning rate rises, from 0 to 1."""
    weight_decay: Annotated[float, bounds.WEIGHT_DECAY.field] = 0.0
    """Ours. AdamW's weight decay."""
    max_grad_norm: Annotated[float, bounds.GRAD_NORM.field] = 1.0
    """Ours. The norm to which a larger gradient is clipped."""

    @model_validator(mode="before")
    @classmethod
    def _point_to_the_right_place(cls, body: Any) -> Any:
        """Refuse a field that belongs elsewhere, and name its right place."""
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
            # A request that spells the default out is the same request.
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
    """Leave out the fields of an unsupported method: it is refused by its name."""
    method = body.get("method")
    if isinstance(method, Mapping) and method.get("type") != "supervised":
        return {name: value for name, value in body.items() if name != "method"}
    return body


def _parse_file_id(text: str, *, param: str) -> uuid.UUID:
    """Return a file's UUID. Raises the error of an unknown file for a malformed id."""
    try:
        return parse_id(IdKind.FILE, text, param=param)
    except NotFoundError as error:
        raise InvalidRequestError(error.message, code="file_not_found", param=param) from error
