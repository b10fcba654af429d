"""The LoRA part of a fused linear, written by hand, is what autograd makes of the formula."""

from __future__ import annotations

import pytest
import torch

from tests.unit.engine.tiny import gradient_pairs, make_engine, make_job, randomise_weights, tiny_llama
from worker.engine.linears import FusedLinear
from worker.engine.packing import Group, PackedSequence
from worker.engine.runs import SlotRows, make_runs

NAME = "model.layers.0.mlp.up_proj"
GROUPS = (
    Group(3, 12, 0, 0, (PackedSequence(3, 7, 11), PackedSequence(7, 12, 12))),
    Group(12, 21, 0, 0, (PackedSequence(12, 21, 13),)),
    Group(21, 24, 0, 0, (PackedSequence(21, 24, 14),)),
)


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_gradient_is_autograds_own(*, dropout: float, is_grouped: bool) -> None:
    model = tiny_llama()
    weight_nk = model.get_submodule(NAME).weight.detach().clone()
    engine = make_engine(model)
    for index in range(3):
        engine.admit(make_job(str(index), seed=index, rank=6, dropout=dropout))
        randomise_weights(engine, str(index), seed=index)
    slots, fused = list(engine._slots.values()), engine._decoder.get_submodule(NAME.removeprefix("model."))
    assert isinstance(fused, FusedLinear)
    runs = make_runs([SlotRows(slot, rows) for slot, rows in zip(slots, GROUPS, strict=True)], is_grouped=is_grouped)
    assert [len(run.parts) for run in runs] == ([3] if is_grouped else [2, 1])
    generator = torch.Generator().manual_seed(1)
    x_1tk = torch.randn(1, 24, 64, generator=generator, requires_grad=True)
    y_grad_1tn = torch.randn(1, 24, 96, generator=generator)
    with engine._context.running(runs):
        y_1tn = fused(x_1tk)
        y_1tn.backward(y_grad_1tn)

    x_again_1tk = x_1tk.detach().clone().requires_grad_()
    mask_tk = torch.cat([run.drop(torch.ones(run.rows.stop - run.rows.start, 64), NAME) for run in runs])
    assert bool((mask_tk == 0).any()) == (dropout > 0)
    dropped_tk = x_again_1tk[0, 3:] * mask_tk
    leaves, pieces = [], [torch.zeros(3, 96)]
    for slot, rows in zip(slots, GROUPS, strict=True):
        pair = slot.pairs()[NAME]
        leaves.append([pair.A_RK.clone().requires_grad_(), pair.B_NR.clone().requires_grad_()])
        x_tk = dropped_tk[rows.start - 3 : rows.end - 3]
        pieces.append(x_tk @ leaves[-1][0].T @ leaves[-1][1].T * slot.job.spec.adapter.scale)
    expected_1tn = torch.nn.functional.linear(x_again_1tk, weight_nk) + torch.cat(pieces)[None]
    expected_1tn.backward(y_grad_1tn)
    torch.testing.assert_close(y_1tn, expected_1tn)
    torch.testing.assert_close(x_1tk.grad, x_again_1tk.grad)
    for slot, (a_rk, b_nr) in zip(slots, leaves, strict=True):
        found = gradient_pairs(slot)[NAME]
        torch.testing.assert_close(found.A_RK, a_rk.grad)
        torch.testing.assert_close(found.B_NR, b_nr.grad)
