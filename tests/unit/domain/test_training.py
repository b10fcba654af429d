"""A job's numbers in the trainer's arithmetic: all that the bounds of a request allow gives valid values."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.domain import bounds
from core.domain.bounds import Bounds
from core.domain.training import (
    BASE_LEARNING_RATE,
    AdapterConfig,
    TrainingSpec,
    learning_rate_at,
    resolve_alpha,
    resolve_learning_rate,
)

MOST_STEPS = int(bounds.EPOCHS.greatest) * 10_000_000  # one example a step


def spec(rate: float, **fields: Any) -> TrainingSpec:
    adapter = AdapterConfig(rank=8, alpha=16, target_modules=("q_proj",))
    numbers = {"n_epochs": 1, "batch_size": 1, "max_seq_len": 64, "seed": 0}
    return TrainingSpec(
        adapter=adapter, learning_rate=rate, learning_rate_multiplier=rate / BASE_LEARNING_RATE, **numbers, **fields
    )


def numbers(of: Bounds) -> st.SearchStrategy[float]:
    return st.floats(of.least, of.greatest)


RATES = numbers(bounds.LEARNING_RATE) | numbers(bounds.LEARNING_RATE_MULTIPLIER).map(resolve_learning_rate)


@given(
    rate=RATES,
    total_steps=st.integers(1, MOST_STEPS),
    share=st.floats(0, 1),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    warmup_ratio=numbers(bounds.WARMUP_RATIO),
)
def test_every_step_has_a_learning_rate_that_is_something(
    rate: float, total_steps: int, share: float, schedule: Any, warmup_ratio: float
) -> None:
    job = spec(rate, learning_rate_schedule=schedule, warmup_ratio=warmup_ratio)
    for step in {1, min(total_steps, 1 + int(share * total_steps)), total_steps}:
        assert 0 < learning_rate_at(job, step, total_steps) <= rate * (1 + 1e-15)


@pytest.mark.parametrize("total_steps", [10**8, MOST_STEPS])
def test_the_last_of_very_many_steps_along_a_cosine_still_learns(total_steps: int) -> None:
    assert learning_rate_at(spec(1e-4, warmup_ratio=0), total_steps, total_steps) > 0


def test_the_cosine_is_the_papers() -> None:
    job = spec(1e-3, warmup_ratio=0.1)
    for step in range(11, 101):
        expected = 1e-3 * 0.5 * (1 + math.cos(math.pi * (step - 11) / 90))
        assert learning_rate_at(job, step, 100) == pytest.approx(expected, rel=1e-12)


@given(
    rank=st.integers(int(bounds.RANK.least), int(bounds.RANK.greatest)),
    alpha=st.none() | numbers(bounds.ALPHA),
    use_rslora=st.booleans(),
)
def test_every_rank_and_alpha_scale_an_adapter_by_something(rank: int, alpha: float | None, use_rslora: bool) -> None:
    chosen = resolve_alpha(rank) if alpha is None else alpha
    adapter = AdapterConfig(rank=rank, alpha=chosen, target_modules=("q_proj",), use_rslora=use_rslora)
    assert 0 < adapter.scale < math.inf


@pytest.mark.parametrize(
    ("rank", "alpha"), [(1, 2), (8, 16), (16, 32), (500_000, 1e6), (2**24, 1e6), (10**400, 1e6)], ids=str
)
def test_alpha_is_twice_the_rank_as_far_as_it_goes(rank: int, alpha: float) -> None:
    assert resolve_alpha(rank) == alpha
