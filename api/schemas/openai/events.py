"""Events: the append-only history of a job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import with_config
from typing_extensions import TypedDict

from api.schemas.wire import STORED, Answer, AsStored, unix_seconds
from core.db.models import Event
from core.domain.ids import IdKind, format_id
from core.services.streams import MissedEvent


@with_config(STORED)
class EventData(TypedDict, total=False):
    """The numbers of an event of type `metrics`: of a training step, of a skipped step, or of an evaluation."""

    step: int
    """The optimizer step. The first step is 1."""
    total_steps: int
    """The number of steps of the whole job. Absent for an evaluation."""
    train_loss: float
    """The mean training loss of a token in this step, in nats."""
    train_mean_token_accuracy: float
    """The part of the step's learnt tokens that the model predicted, from 0 to 1."""
    learning_rate: float
    """The learning rate of this step."""
    num_tokens: int
    """The number of tokens that this step was trained on."""
    is_skipped: bool
    """True if the step changed nothing because its gradient was not finite. Absent otherwise."""
    full_valid_loss: float
    """The mean loss of a token of the whole validation file, in nats. Present for an evaluation."""
    full_valid_mean_token_accuracy: float
    """The part of the validation file's tokens that the model predicted, from 0 to 1. Present for an evaluation."""


class EventObject(Answer):
    """One event of a job."""

    id: str
    """The event's id, which begins with `ftevent-`."""
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    """The kind of this object."""
    created_at: int
    """When the event happened, in Unix seconds."""
    level: Literal["info", "warn", "error"]
    """How serious the event is.

    - `info`: The job goes as it should.
    - `warn`: Something is worth a look, and the job goes on or can be resumed.
    - `error`: The job has failed.
    """
    message: str
    """What happened, for people."""
    type: Literal["message", "metrics"]
    """`metrics` if `data` holds numbers, otherwise `message`."""
    data: Annotated[EventData, AsStored()] | None
    """The numbers of a `metrics` event. Null for a `message`."""

    @classmethod
    def of(cls, row: Event | MissedEvent) -> EventObject:
        return cls(
            id=format_id(IdKind.EVENT, row.id),
            created_at=unix_seconds(row.created_at),
            level=row.level,
            message=row.message,
            type=row.type,
            data=row.details,
        )
