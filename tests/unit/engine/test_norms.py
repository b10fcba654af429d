"""A frozen norm equals transformers' own, forward and backward."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.unit.engine.tiny import tiny_llama
from worker.engine.norms import FrozenNorm, freeze_norms

WIDTH = 96


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(1, 7, WIDTH), (1, 7, 3, WIDTH)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_it_norms_as_transformers_does(
    *, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = LlamaRMSNorm(WIDTH, eps=1e-6)
    theirs.weight = torch.nn.Parameter(torch.randn(WIDTH, generator=generator), requires_grad=False)
    ours = FrozenNorm(theirs.to(dtype).weight, theirs.variance_epsilon)
    x, y_grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    results = []
    for norm in (theirs, ours):
        leaf = (x * scale).requires_grad_()
        y = norm(leaf)
        y.backward(y_grad)
        results.append((y, leaf.grad))
    for wanted, found in zip(*results, strict=True):
        assert found.dtype == dtype
        assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_every_norm_of_a_llama_is_frozen() -> None:
    model = tiny_llama()
    freeze_norms(model)
    names = [name for name, module in model.named_modules() if isinstance(module, FrozenNorm)]
    assert len(names) == 2 * model.config.num_hidden_layers + 1
    assert not any(isinstance(module, LlamaRMSNorm) for module in model.modules())
