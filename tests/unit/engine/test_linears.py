"""The LoRA part of fused siblings, written by hand, equals autograd's result for the formula."""

from __future__ import annotations

import pytest
import torch

from tests.unit.engine.tiny import gradient_pairs, make_engine, make_job, randomise_weights, tiny_llama
from worker.engine import Engine, UnsupportedBaseError
from worker.engine.packing import Group, PackedSequence
from worker.engine.runs import SlotRows, make_runs
from worker.engine.slots import Slot

PARENT = "model.layers.0.self_attn."
SIBLINGS = ("q_proj", "k_proj", "v_proj")
GROUPS = (
    Group(3, 12, (PackedSequence(3, 7, 11, 0), PackedSequence(7, 12, 12, 0))),
    Group(12, 21, (PackedSequence(12, 21, 13, 0),)),
    Group(21, 24, (PackedSequence(21, 24, 14, 0),)),
)


@pytest.mark.parametrize("target_modules", [SIBLINGS, ("q_proj", "v_proj"), ("k_proj",), ("o_proj",)])
@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_gradient_is_autograds_own(*, dropout: float, is_grouped: bool, target_modules: tuple[str, ...]) -> None:
    model = tiny_llama()
    weights = {name: model.get_submodule(PARENT + name).weight.detach().clone() for name in SIBLINGS}
    engine = make_engine(model)
    for index in range(3):
        engine.admit(make_job(str(index), seed=index, rank=6, dropout=dropout, target_modules=target_modules))
        randomise_weights(engine, str(index), seed=index)
    slots = list(engine._slots.values())
    runs = make_runs([SlotRows(slot, rows) for slot, rows in zip(slots, GROUPS, strict=True)], is_grouped=is_grouped)
    assert [len(run.parts) for run in runs] == ([3] if is_grouped else [2, 1])
    generator = torch.Generator().manual_seed(1)
    x_1tk = torch.randn(1, 24, 64, generator=generator, requires_grad=True)
    y_grads = [torch.randn(1, 24, len(weights[name]), generator=generator) for name in SIBLINGS]
    with engine._context.running(runs):
        ys = [linear_of(engine, name)(x_1tk) for name in SIBLINGS]
        torch.autograd.backward(ys, y_grads)

    x_again_1tk = x_1tk.detach().clone().requires_grad_()
    leaves: dict[tuple[Slot, str], list[torch.Tensor]] = {}
    for name, y_1tn, y_grad_1tn in zip(SIBLINGS, ys, y_grads, strict=True):
        expected_1tn = torch.nn.functional.linear(x_again_1tk, weights[name])
        if name in target_modules:
            mask_tk = torch.cat(
                [run.drop(torch.ones(run.rows.stop - run.rows.start, 64), PARENT + name) for run in runs]
            )
            assert bool((mask_tk == 0).any()) == (dropout > 0)
            dropped_tk, pieces = x_again_1tk[0, 3:] * mask_tk, [torch.zeros(3, len(weights[name]))]
            for slot, rows in zip(slots, GROUPS, strict=True):
                pair = slot.row.pairs()[PARENT + name]
                a_rk, b_nr = leaves[slot, name] = [
                    pair.A_RK.clone().requires_grad_(),
                    pair.B_NR.clone().requires_grad_(),
                ]
                x_tk = dropped_tk[rows.start - 3 : rows.end - 3]
                pieces.append(x_tk @ a_rk.T @ b_nr.T * slot.job.spec.adapter.scale)
            expected_1tn = expected_1tn + torch.cat(pieces)
        torch.testing.assert_close(y_1tn, expected_1tn)
        expected_1tn.backward(y_grad_1tn)
    torch.testing.assert_close(x_1tk.grad, x_again_1tk.grad)
    for (slot, name), (a_rk, b_nr) in leaves.items():
        found = gradient_pairs(slot)[PARENT + name]
        torch.testing.assert_close(found.A_RK, a_rk.grad)
        torch.testing.assert_close(found.B_NR, b_nr.grad)


def linear_of(engine: Engine, name: str) -> torch.nn.Module:
    return engine._base.decoder.get_submodule(PARENT.removeprefix("model.") + name)


def test_a_base_whose_siblings_do_not_read_the_same_rows_is_refused() -> None:
    model = tiny_llama()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x.clone()))
    with pytest.raises(
        UnsupportedBaseError, match="gate_proj and model.layers.1.mlp.up_proj do not read the same rows"
    ):
        make_engine(model)
