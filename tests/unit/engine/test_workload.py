"""The benchmarks' computations apart from their times."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.unit.engine.tiny import make_engine, tiny_llama


def test_utilization_counts_every_weight_that_a_token_is_multiplied_with(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.syspath_prepend(pytestconfig.rootpath)  # bench is no part of the installed package
    workload, model = import_module("bench.workload"), tiny_llama()
    num_weights = sum(each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Linear))
    share = workload.utilization(make_engine(model), 1e6)
    assert share == pytest.approx(4 * num_weights * 1e6 / workload.H100_BF16_FLOPS)
