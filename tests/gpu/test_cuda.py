"""What differs on a GPU: grouped products, the variable-length attention kernel, NF4 into reused memory, the allocator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit

from bench.workload import quantize
from tests.unit.engine.company import check_company_costs_no_more_than_padding
from tests.unit.engine.tiny import (
    fused_gradients,
    make_engine,
    make_job,
    randomise_weights,
    relative_difference,
    tiny_llama,
    train,
    weights_of,
)
from worker.engine import Engine, EngineJob, Example
from worker.engine.attention import attend_packed
from worker.engine.packing import SequenceLayout

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
JOBS = [
    make_job("wide", seed=1, rank=4, alpha=8.0),
    make_job("twin", seed=5, rank=4, alpha=8.0),  # of wide's kind: their products are two groups of one
    make_job("narrow", seed=2, rank=6, alpha=3.0, target_modules=("q_proj", "down_proj"), count=7),
    make_job("deep", seed=3, rank=16, use_rslora=True, batch_size=4, count=9),
    make_job("wet", seed=4, rank=16, dropout=0.2),
]


@pytest.fixture(autouse=True)
def whole_memory() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def engine_of(model: torch.nn.Module, jobs: list[EngineJob], *, max_tokens: int = 256) -> Engine:
    engine = make_engine(model, max_slots=len(JOBS), max_tokens=max_tokens)
    for job in jobs:
        engine.admit(job)
        randomise_weights(engine, job.slot_name, seed=job.spec.seed)
    return engine


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].float().cpu().flatten() for name in sorted(gradients)])


def test_gradients_in_fp32_are_those_of_the_cpu() -> None:
    dry = JOBS[:4]  # a GPU draws other dropout masks
    found = fused_gradients(engine_of(tiny_llama().to(CUDA), dry))
    wanted = fused_gradients(engine_of(tiny_llama(), dry))
    for job in dry:
        assert relative_difference(flat(found[job.slot_name]), flat(wanted[job.slot_name])) < 1e-4


def test_company_costs_a_job_on_a_bf16_base_no_more_than_padding_does(tmp_path: Path) -> None:
    check_company_costs_no_more_than_padding(tmp_path, CUDA)


def test_other_tenants_poison_leaves_my_gradients_bitwise_unchanged() -> None:
    engine = engine_of(tiny_llama().to(CUDA, torch.bfloat16), JOBS)
    before = fused_gradients(engine)["narrow"]
    for slot_name, value in (("wide", torch.nan), ("deep", torch.inf), ("wet", 1e30)):
        for pair in engine._slots[slot_name].row.pairs().values():
            pair.A_RK.fill_(value)
    after = fused_gradients(engine)["narrow"]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("window", [None, 8])
def test_the_segment_kernel_attends_as_each_sequence_would_alone(window: int | None) -> None:
    lengths, generator = (5, 33, 1, 64), torch.Generator(CUDA).manual_seed(0)
    sequences = SequenceLayout.of(lengths, CUDA)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 64, device=CUDA, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    )
    exact, _ = attend_packed(None, query, key, value, None, sequences=sequences, sliding_window=window)
    queries, keys, values = (rows.bfloat16() for rows in (query, key, value))
    found, _ = attend_packed(None, queries, keys, values, None, sequences=sequences, sliding_window=window)
    torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=2e-2)
    weights = torch.randn(exact.shape, device=CUDA, generator=generator)
    for leaf in (query, key, value):
        (wanted,) = torch.autograd.grad((exact * weights).sum(), leaf, retain_graph=True)
        (got,) = torch.autograd.grad((found.float() * weights).sum(), leaf, retain_graph=True)
        assert relative_difference(got, wanted) < 2e-2


def test_an_nf4_base_trains_as_its_own_numbers_do() -> None:
    quantized, dense = tiny_llama().to(CUDA, torch.bfloat16), tiny_llama().to(CUDA, torch.bfloat16)
    quantize(quantized, torch.bfloat16)
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            numbers = dequantize_4bit(weight.data, weight.quant_state)
            dense.get_submodule(name).weight.data.copy_(numbers)
    found, wanted = (fused_gradients(engine_of(model, JOBS)) for model in (quantized, dense))
    for job in JOBS:
        assert relative_difference(flat(found[job.slot_name]), flat(wanted[job.slot_name])) < 1e-2


def test_a_device_too_small_for_a_whole_batch_trains_it_in_parts_to_the_same_end() -> None:
    rng = np.random.default_rng(0)
    rows = [Example(rng.integers(1, 128, size=250).astype(np.int64), np.arange(250) > 0) for _ in range(64)]
    job = replace(make_job("long", batch_size=64, n_epochs=2), examples=rows)
    roomy, tight = (engine_of(tiny_llama().to(CUDA), [job], max_tokens=64 * 250) for _ in range(2))
    wanted = train(roomy)["long"]
    used = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + used) / 2 / total)
    found = train(tight)["long"]
    assert tight._budget.tokens < 64 * 250
    assert [update.loss for update in found] == pytest.approx([update.loss for update in wanted], abs=1e-4)
    mine, yours = weights_of(tight, "long"), weights_of(roomy, "long")
    assert max(relative_difference(mine[name], yours[name]) for name in mine) < 1e-2
