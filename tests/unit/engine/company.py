"""What company costs a job on a bf16 base, measured against what padding the same job costs it alone.

The tests of the CPU and those of a GPU ask the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from core.domain.training import order_examples
from tests.unit.engine.tiny import (
    fused_gradients,
    load_with_peft,
    make_engine,
    make_job,
    peft_gradients,
    randomise_weights,
    relative_difference,
    tiny_llama,
)
from worker.engine import Engine, EngineJob, Example

MINE = make_job("mine", rank=8, count=6, batch_size=6)
BEFORE, AFTER = make_job("before", seed=5), make_job("after", seed=6, rank=16)


def bf16_base(device: torch.device) -> Any:
    return tiny_llama().to(device, torch.bfloat16)


def bf16_engine(jobs: list[EngineJob], device: torch.device) -> Engine:
    engine = make_engine(bf16_base(device), max_tokens=1024)
    for job in jobs:
        engine.admit(job)
    randomise_weights(engine, "mine")
    return engine


def my_gradient(engine: Engine) -> torch.Tensor:
    return flatten(fused_gradients(engine)["mine"])


def flatten(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].float().cpu().flatten() for name in sorted(gradients)])


def padded_gradient(examples: list[Example], length: int, directory: Path, device: torch.device) -> torch.Tensor:
    """Return PEFT's gradient of the batch as one rectangle of this length, as a trainer without packing makes it."""
    model = load_with_peft(bf16_base(device), directory)
    ids, is_real = torch.zeros(len(examples), length, dtype=torch.long), torch.zeros(len(examples), length)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        ids[row, : example.num_tokens] = torch.from_numpy(example.token_ids)
        is_real[row, : example.num_tokens] = 1
        is_label = torch.from_numpy(example.is_label)
        labels[row, : example.num_tokens][is_label] = ids[row, : example.num_tokens][is_label]
    logits = model(input_ids=ids.to(device), attention_mask=is_real.to(device)).logits[:, :-1].float().cpu()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
    named = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return flatten(named)


def check_company_costs_no_more_than_padding(directory: Path, device: torch.device) -> None:
    alone = bf16_engine([MINE], device)
    alone.export_adapter("mine", directory)
    solo, fused = my_gradient(alone), my_gradient(bf16_engine([BEFORE, MINE, AFTER], device))
    examples = [MINE.examples[index] for index in order_examples(MINE.spec.seed, 0, len(MINE.examples))]
    _, unpadded = peft_gradients(MINE, bf16_base(device), directory)
    _, exact = peft_gradients(MINE, tiny_llama(), directory)
    padding = relative_difference(padded_gradient(examples, 48, directory, device), flatten(unpadded))
    assert 0 < padding < 0.05
    assert relative_difference(fused, solo) <= padding
    # Both are one bf16 rounding away from the truth, and by about as much.
    assert relative_difference(fused, flatten(exact)) < 1.5 * relative_difference(flatten(unpadded), flatten(exact))
