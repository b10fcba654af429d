"""The LoRA part of a fused linear, written by hand, is what autograd makes of the formula."""

from __future__ import annotations

import pytest
import torch

from tests.unit.engine.tiny import make_engine, make_job, randomise_weights
from worker.engine.linears import FusedLinear, SlotRows, _drop
from worker.engine.packing import Group, PackedSequence

NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_gradient_is_autograds_own(dropout: float) -> None:
    engine = make_engine()
    engine.admit(make_job("mine", rank=6, dropout=dropout))
    randomise_weights(engine, "mine")
    slot, fused = engine._slots["mine"], engine._decoder.get_submodule(NAME.removeprefix("model."))
    assert isinstance(fused, FusedLinear)
    grads = slot.view(torch.zeros_like(slot.weights_P))
    rows = Group(slot.index, 3, 12, 0, 0, (PackedSequence(3, 7, 11), PackedSequence(7, 12, 12)))
    part = SlotRows(slot, rows, grads)
    generator = torch.Generator().manual_seed(1)
    x_1tk = torch.randn(1, 12, 64, generator=generator, requires_grad=True)
    y_grad_1tn = torch.randn(1, 12, 96, generator=generator)
    engine._context.parts = (part,)
    y_1tn = fused(x_1tk)
    y_1tn.backward(y_grad_1tn)

    x_again_1tk = x_1tk.detach().clone().requires_grad_()
    a_rk = slot.weights[NAME].A_RK.clone().requires_grad_()
    b_nr = slot.weights[NAME].B_NR.clone().requires_grad_()
    mask_tk = _drop(torch.ones(9, 64), part, NAME)
    assert bool((mask_tk == 0).any()) == (dropout > 0)
    lora_tn = (x_again_1tk[0, 3:] * mask_tk) @ a_rk.T @ b_nr.T * slot.job.spec.adapter.scale
    expected_1tn = fused.base(x_again_1tk) + torch.cat([torch.zeros(3, 96), lora_tn])[None]
    expected_1tn.backward(y_grad_1tn)
    torch.testing.assert_close(y_1tn, expected_1tn)
    torch.testing.assert_close(x_1tk.grad, x_again_1tk.grad)
    torch.testing.assert_close(grads[NAME].A_RK, a_rk.grad)
    torch.testing.assert_close(grads[NAME].B_NR, b_nr.grad)
