"""The rows that an objective gets suffice for its loss: of single label tokens, and of answers in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from core.domain.training import order_examples
from tests.unit.engine.tiny import (
    fused_gradients,
    load_with_peft,
    make_engine,
    make_job,
    randomise_weights,
    relative_difference,
    tiny_llama,
    train,
)
from worker.engine import EngineJob, Example
from worker.engine.objectives import LabelRows, Sums
from worker.engine.objectives.supervised import CrossEntropy

BETA = 0.05  # small enough that no pair is so sure that its gradient vanishes


class Preference:
    """A Bradley-Terry loss (1952): the first answer of each pair is to be the likelier one."""

    def count_units(self, examples: Sequence[Example]) -> int:
        return len(examples) // 2

    def sum_units(self, rows: LabelRows) -> Sums:
        answers = torch.stack([each.sum() for each in rows.nll_M.split(list(rows.num_labels))]).view(-1, 2)
        margins = BETA * (answers[:, 1] - answers[:, 0])
        return Sums(loss=-functional.logsigmoid(margins).sum(), num_right=(margins > 0).sum())


def preference_gradients(job: EngineJob, directory: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of the job's first batch, by plain PEFT and autograd."""
    model = load_with_peft(tiny_llama(), directory)
    order = order_examples(job.spec.seed, 0, len(job.examples))
    answers = []
    for index in order[: job.spec.batch_size]:
        ids = torch.from_numpy(job.examples[index].token_ids)[None]
        losses = functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        answers.append(losses[torch.from_numpy(job.examples[index].is_label[1:])].sum())
    first, second = torch.stack(answers).view(-1, 2).unbind(dim=1)
    loss = -functional.logsigmoid(BETA * (second - first)).mean()
    loss.backward()
    named = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), named


def test_a_loss_of_pairs_has_autograds_gradient_beside_a_slot_that_learns_label_tokens(tmp_path: Path) -> None:
    job = make_job("pairs", count=4, batch_size=4, learning_rate=1e-9)
    alone, engine = make_engine(), make_engine()
    for each in (alone, engine):
        each.admit(make_job("tokens", seed=5))
        randomise_weights(each, "tokens", seed=3)
    engine.admit(job)
    engine._slots["pairs"].objective = Preference()
    randomise_weights(engine, "pairs")
    engine.export_adapter("pairs", tmp_path)
    loss, wanted = preference_gradients(job, tmp_path)
    found = fused_gradients(engine)
    assert wanted.keys() == found["pairs"].keys()
    assert all(relative_difference(found["pairs"][name], wanted[name]) < 1e-4 for name in wanted)
    expected = fused_gradients(alone)["tokens"]
    assert all(relative_difference(found["tokens"][name], expected[name]) < 1e-5 for name in expected)
    first = train(engine, num_fused_steps=1)["pairs"][0]
    assert first.loss == pytest.approx(loss, rel=1e-5)
    assert first.num_units == 2


def test_the_cross_entropys_unit_is_the_label_token() -> None:
    examples = make_job("mine").examples
    rows = LabelRows(torch.tensor([0.5, 2.0, 1.0]), torch.tensor([True, False, True]), num_labels=(1, 2))
    sums = CrossEntropy().sum_units(rows)
    assert (float(sums.loss), int(sums.num_right)) == (3.5, 2)
    assert CrossEntropy().count_units(examples) == sum(int(each.is_label[1:].sum()) for each in examples)
