"""Base models, as the registry and the operator define them, and where their tokenizers are stored."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import ARRAY, CheckConstraint, ForeignKey, Text, func, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Json, Row, check_bounds, check_known
from core.domain import bounds
from core.domain.bases import BaseState


class BaseModelRow(Row):
    __tablename__ = "base_models"
    __table_args__ = (
        check_bounds("max_seq_len", bounds.SEQ_LEN),
        check_bounds("max_rank", bounds.RANK),
        check_bounds("slots", bounds.SLOTS),
        check_bounds("max_tokens_per_step", bounds.TOKENS_PER_STEP),
        CheckConstraint("cardinality(target_modules) > 0", name="has_target_modules"),
        check_known("state", BaseState),
        CheckConstraint("(state = 'unusable') = (state_reason is not null)", name="reason_when_unusable"),
        CheckConstraint("char_length(license) between 1 and 128", name="license_is_a_name"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[Json]
    dtype: Mapped[str]
    quantizations: Mapped[list[str]] = mapped_column(ARRAY(Text))
    target_modules: Mapped[list[str]] = mapped_column(ARRAY(Text))
    max_seq_len: Mapped[int]
    max_rank: Mapped[int]
    slots: Mapped[int]
    max_tokens_per_step: Mapped[int]
    chat_template: Mapped[str | None]
    # The licence of the weights; null where it is not known.
    license: Mapped[str | None]
    # `disabled_at` is the operator's own switch. The registry does not change it.
    is_in_registry: Mapped[bool] = mapped_column("is_enabled", server_default=text("true"))
    # True for a base added by `base-models add`. A registry file that does not name this base leaves it alone.
    is_registered_by_hand: Mapped[bool] = mapped_column(server_default=text("false"))
    disabled_at: Mapped[dt.datetime | None]
    # What the last worker or operator found that loaded it. The reason is written for operators.
    state: Mapped[str] = mapped_column(server_default=BaseState.UNCHECKED)
    state_reason: Mapped[str | None]
    state_since: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    checked_by: Mapped[str | None]
    created_at: Mapped[CreatedAt]


class BaseTokenizer(Row):
    """Where the tokenizer of a base is stored. The worker that loaded the base last has stored it."""

    __tablename__ = "base_tokenizers"
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"), primary_key=True)
    object_key: Mapped[str]
    published_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
