"""A request becomes a training: every "auto" a number, within the base's limits."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.db.models import BaseModelRow
from core.domain import bounds
from core.domain.errors import InvalidRequestError
from core.domain.job_requests import JobRequest
from core.domain.training import TrainingSpec
from core.services.submissions import resolve_spec

MOST = int(bounds.RANK.greatest)
BASE = BaseModelRow(id="b", max_rank=MOST, max_seq_len=256, target_modules=["q_proj"])


def resolve(**fields: Any) -> TrainingSpec:
    request = JobRequest(base_model_id="b", training_file_id=uuid.UUID(int=0), **fields)
    return resolve_spec(request, base=BASE, num_examples=10)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 2), (8, 16), (16, 32), (MOST, 1e6)])
def test_alpha_is_twice_the_rank_at_any_rank_that_a_base_may_take(rank: int, alpha: float) -> None:
    assert resolve(rank=rank).adapter.alpha == alpha
    assert resolve(rank=rank, alpha=0.5).adapter.alpha == 0.5


@pytest.mark.parametrize("rank", [0, -1, MOST + 1, 10**400])
def test_a_rank_that_the_base_does_not_take_is_refused_by_its_name(rank: int) -> None:
    with pytest.raises(InvalidRequestError, match="takes 1 to") as refused:
        resolve(rank=rank)
    assert refused.value.param == "adapter.rank"


def within(limits: bounds.Bounds) -> st.SearchStrategy[float]:
    return st.floats(limits.least, limits.greatest)


@given(
    numbers=st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": within(bounds.LEARNING_RATE),
            "learning_rate_multiplier": within(bounds.LEARNING_RATE_MULTIPLIER),
            "alpha": within(bounds.ALPHA),
            "rank": st.integers(1, MOST),
            "dropout": within(bounds.DROPOUT),
            "weight_decay": within(bounds.WEIGHT_DECAY),
            "max_grad_norm": within(bounds.GRAD_NORM),
            "warmup_ratio": within(bounds.WARMUP_RATIO),
        },
    )
)
def test_every_request_within_the_bounds_becomes_a_training(numbers: dict[str, Any]) -> None:
    spec = resolve(**numbers)
    assert spec.learning_rate > 0
    assert spec.adapter.scale > 0
    assert spec.learning_rate_multiplier > 0
