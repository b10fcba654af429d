"""A frozen weight multiplies like torch's own linear, forward and backward, in every form that it is stored in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit

from worker.engine.frozen import DenseWeight, FrozenWeight, Nf4Weight, PackedWeight, freeze_linear

IN, OUT = 128, 192


def make_linear(*, has_bias: bool, dtype: torch.dtype) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(IN, OUT, bias=has_bias).to(dtype)


def assert_multiplies_like(frozen: FrozenWeight, weight_nk: torch.Tensor, bias_n: torch.Tensor | None) -> None:
    for num_rows in (1, 16, 127, 300):  # what it is laid out for, and what it is not
        x_1tk = torch.randn(1, num_rows, IN, dtype=weight_nk.dtype, requires_grad=True)
        y_1tn = torch.nn.functional.linear(x_1tk, weight_nk, bias_n)
        y_grad_1tn = torch.randn_like(y_1tn)
        y_1tn.backward(y_grad_1tn)
        torch.testing.assert_close(frozen.multiply(x_1tk.detach()), y_1tn.detach())
        torch.testing.assert_close(frozen.multiply_back(y_grad_1tn), x_1tk.grad)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, PackedWeight), (torch.bfloat16, DenseWeight)])
def test_a_dense_weight(*, has_bias: bool, dtype: torch.dtype, form: type[FrozenWeight]) -> None:
    linear = make_linear(has_bias=has_bias, dtype=dtype)
    frozen = freeze_linear(linear, scratch={})
    assert isinstance(frozen, form)
    assert_multiplies_like(frozen, linear.weight.detach(), linear.bias)


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_weight_in_nf4(*, has_bias: bool, is_nested: bool) -> None:
    linear = make_linear(has_bias=has_bias, dtype=torch.float32)
    quantised = Linear4bit(IN, OUT, bias=has_bias, compute_dtype=torch.float32, quant_type="nf4")
    quantised.weight = Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=is_nested
    )
    quantised.bias = linear.bias
    quantised = quantised.to("cpu")
    frozen = freeze_linear(quantised, scratch={})
    assert isinstance(frozen, Nf4Weight)
    weight: Any = quantised.weight
    assert weight.quant_state.nested == is_nested
    restored_nk = dequantize_4bit(weight.data, weight.quant_state)
    assert_multiplies_like(frozen, restored_nk, quantised.bias)
