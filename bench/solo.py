"""One job alone against a common trainer for single jobs: `python -m bench.solo [--rounds N]`.

The peer is TRL's SFTTrainer over PEFT with `packing=True`: the same examples, the same adapter, AdamW, clipping and
learning rate, on a base of the same widths, with the model already loaded and the rows already tokenised and packed.
Both train the same rows once. A line is the ratio of seconds, TRL over the engine, in turns: min / median / max.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.workload import (
    ALPHA,
    DEVICE,
    LEARNING_RATE,
    MODULES,
    RANK,
    Base,
    command,
    llama3_8b,
    machine,
    make_engine,
    make_job,
    qwen3,
    roofline,
    seconds_of,
    smollm2_135m,
    spread,
    synchronize,
)
from worker.engine import Engine, EngineJob


@dataclass(frozen=True)
class Point:
    """A base, the longest row, and how many rows are trained: their lengths are spread up to the longest."""

    base: Base
    max_length: int
    num_rows: int
    rows_per_step: int

    def lengths(self) -> list[int]:
        drawn = np.random.default_rng(0).integers(self.max_length // 8, self.max_length + 1, size=self.num_rows)
        return [int(length) for length in drawn]


def points() -> list[Point]:
    if DEVICE.type == "cuda":
        half = torch.bfloat16
        return [
            Point(Base("Qwen3-0.6B", qwen3(1024, 3072, 28, 16), dtype=half), 2048, 64, 8),
            Point(Base("Llama-3-8B", llama3_8b(), dtype=half), 4096, 32, 4),
        ]
    return [Point(Base("SmolLM2-135M", smollm2_135m()), longest, 24, 8) for longest in (64, 256)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    disable_progress_bars()
    print(f"{machine()}\n$ {command()}\n")
    print("| base | rows up to | TRL / Espalier | Espalier tokens/s | MFU |")
    print("|---|---|---|---|---|")
    for point in points():
        print(measure(point, rounds=options.rounds), flush=True)


def measure(point: Point, *, rounds: int) -> str:
    lengths = point.lengths()
    job = make_job(0, lengths=lengths, batch_size=point.rows_per_step)
    engine = make_engine(point.base.build(), max_slots=1, max_tokens=point.max_length * point.rows_per_step)
    engine.admit(job)
    with tempfile.TemporaryDirectory() as scratch:
        clock = StepClock()
        trl = make_trl(point, job, Path(scratch), clock)
        trl.train()
        train_epoch(engine, job)
        ratios, seconds = [], []
        for _ in range(rounds):
            trl.train()
            seconds.append(seconds_of(lambda: train_epoch(engine, job)))
            ratios.append(clock.seconds / seconds[-1])
    rate = sum(lengths) / min(seconds)
    return f"| {point.base.label} | {point.max_length} | {spread(ratios)} | {rate:.0f} | {roofline(engine, rate)} |"


class StepClock(TrainerCallback):
    """Times the peer's steps alone: what it makes ready before the first and tidies after the last is left out."""

    def __init__(self) -> None:
        self._started = self.seconds = 0.0

    def on_epoch_begin(self, *_state: Any, **_more: Any) -> None:
        synchronize()
        self._started = time.perf_counter()

    def on_epoch_end(self, *_state: Any, **_more: Any) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self._started


def make_trl(point: Point, job: EngineJob, scratch: Path, clock: StepClock) -> Any:
    """Return a trainer that takes as many tokens a step as the job's batches have on average."""
    rows = [{"input_ids": example.token_ids.tolist()} for example in job.examples]
    arguments = SFTConfig(
        output_dir=str(scratch),
        packing=True,
        max_length=point.max_length,
        per_device_train_batch_size=max(1, _mean(point.lengths()) * point.rows_per_step // point.max_length),
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=point.base.dtype == torch.bfloat16,
        use_cpu=DEVICE.type == "cpu",
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), task_type="CAUSAL_LM")  # type: ignore[arg-type]
    return SFTTrainer(
        point.base.build(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter,
        processing_class=unused_tokenizer(),
        callbacks=[clock],
    )


def unused_tokenizer() -> PreTrainedTokenizerFast:
    """Return what the trainer insists on having; the rows are token ids already."""
    words = Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def train_epoch(engine: Engine, job: EngineJob) -> None:
    num_updates = 0
    while num_updates < -(-len(job.examples) // job.spec.batch_size):
        num_updates += sum(report.update is not None for report in engine.step())


def _mean(lengths: Sequence[int]) -> int:
    return sum(lengths) // len(lengths)


if __name__ == "__main__":
    main()
