"""The bases, jobs and peers of the benchmarks: bases of real widths, jobs of fixed lengths, and plain PEFT as the peer.

The peer is a strong one: the base is loaded once and stays hot, attention is SDPA, the optimizer is torch's fused
AdamW, gradients are set to None, and clipping is torch's own. Both sides compute in the same process with the same
threads.
"""

from __future__ import annotations

import copy
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from core.domain.training import AdapterConfig, TrainingSpec
from worker.engine import Engine, EngineJob, Example

warnings.filterwarnings("ignore")
transformers_logging.set_verbosity_error()

MODULES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 1e-4
H100_BF16_FLOPS = 790e12  # dense, at the card's boost under load; the roofline of ENGINE's limits
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Base:
    """A base model by its widths; its weights are random, which costs a step exactly as much as trained ones."""

    name: str
    config: Any
    is_nf4: bool = False
    dtype: torch.dtype = torch.float32

    def build(self) -> Any:
        torch.manual_seed(0)
        kind: Any = Qwen3ForCausalLM if isinstance(self.config, Qwen3Config) else LlamaForCausalLM
        with torch.device(DEVICE):
            model = kind(copy.deepcopy(self.config)).to(self.dtype)  # the engine writes into its own
        if self.is_nf4:
            quantize(model, self.dtype)
        return model

    @property
    def label(self) -> str:
        return f"{self.name} {'nf4' if self.is_nf4 else str(self.dtype).removeprefix('torch.')}"


def smollm2_135m(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
    }
    return LlamaConfig(
        vocab_size=49152,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **sizes,
        **changes,
    )


def qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )


def llama3_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )


def quantize(model: Any, dtype: torch.dtype) -> None:
    """Replace every linear but the head by NF4 with double quantization, as transformers does when it loads a base."""
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or linear is model.get_output_embeddings():
            continue
        layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = Params4bit(
            linear.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        model.set_submodule(name, layer.to(DEVICE))


def make_job(number: int, *, lengths: Sequence[int], batch_size: int = 1) -> EngineJob:
    """Return a job of examples of these lengths, every token but the first a label."""
    rng = np.random.default_rng(number)
    examples = [
        Example(rng.integers(1, 49000, size=length).astype(np.int64), np.arange(length) > 0) for length in lengths
    ]
    spec = TrainingSpec(
        adapter=AdapterConfig(rank=RANK, alpha=ALPHA, target_modules=MODULES),
        n_epochs=50,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        learning_rate_schedule="constant",
        warmup_ratio=0,
        max_seq_len=8192,
        seed=number,
    )
    return EngineJob(str(number), spec, examples, tenant=str(number))


def make_engine(model: Any, *, max_slots: int, max_tokens: int) -> Engine:
    return Engine(model, base_model_id="bench", max_slots=max_slots, max_rank=64, max_tokens_per_step=max_tokens)


class PeftTrainer:
    """Plain PEFT with a loop written by hand: one adapter on a base that stays loaded."""

    def __init__(self, model: Any) -> None:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), task_type="CAUSAL_LM")  # type: ignore[arg-type]
        self.model: Any = get_peft_model(model, config)
        self.model.train()
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(self, ids: torch.Tensor, labels: torch.Tensor, **inputs: torch.Tensor) -> float:
        """Take one optimizer step on a batch [B, L] and return its loss, as a trainer that logs does."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=ids, labels=labels, **inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        return float(loss)


def padded_batch(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Return the examples as one rectangle, as a trainer without packing feeds them."""
    length = max(example.num_tokens for example in examples)
    ids, labels = torch.zeros(len(examples), length, dtype=torch.long), torch.full((len(examples), length), -100)
    for row, example in enumerate(examples):
        tokens = torch.from_numpy(example.token_ids)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(example.is_label), tokens, -100)
    batch = {"ids": ids.to(DEVICE), "labels": labels.to(DEVICE)}
    if len({example.num_tokens for example in examples}) > 1:
        batch["attention_mask"] = (torch.arange(length)[None] < torch.tensor([[e.num_tokens] for e in examples])).to(
            DEVICE
        )
    return batch


def packed_batch(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Return the examples end to end in one row with positions that restart, as transformers packs without a mask."""
    ids = torch.cat([torch.from_numpy(example.token_ids) for example in examples])
    is_label = torch.cat([torch.from_numpy(example.is_label) for example in examples])
    positions = torch.cat([torch.arange(example.num_tokens) for example in examples])
    batch = {"ids": ids, "labels": torch.where(is_label, ids, -100), "position_ids": positions}
    return {name: tensor[None].to(DEVICE) for name, tensor in batch.items()}


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long work takes, the device's part included."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def roofline(engine: Engine, tokens_per_second: float) -> str:
    """Return the utilization as a table shows it; of a CPU the peak is not known."""
    return f"{utilization(engine, tokens_per_second):.1%}" if DEVICE.type == "cuda" else "-"


def utilization(engine: Engine, tokens_per_second: float) -> float:
    """Return the share of the card's dense bf16 peak that the base's products take."""
    return engine.flops_per_token * tokens_per_second / H100_BF16_FLOPS


def spread(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}"


def machine() -> str:
    """Return the line that a result is worth nothing without."""
    if DEVICE.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}"
    model = next(
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    )
    name = model.partition(":")[2].strip()
    return f"{torch.get_num_threads()} threads of {name}, torch {torch.__version__}, Python {platform.python_version()}"


def command() -> str:
    return "python -m bench." + " ".join([sys.argv[0].rpartition("/")[2].removesuffix(".py"), *sys.argv[1:]])
