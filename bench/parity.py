"""The service's adapter is plain PEFT's: `python -m bench.parity [--steps N]`, on the real base, in fp32 on a CPU.

Two jobs with different data are trained together by the engine, and each alone by PEFT with a loop written by hand: the
same first weights, order of data, AdamW, clipping and schedule. Prints the largest difference of a step's loss (the bar
is 1e-4) and of the trained weights' total update.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.workload import MODULES, command, machine, make_engine
from cli.demo.documentation import build_documentation
from core.domain.datasets import parse_example
from core.domain.datasets.tokenizers import BaseTokenizer
from core.domain.training import AdapterConfig, TrainingSpec, count_steps, learning_rate_at, order_examples
from local.binaries import find_smollm2
from worker.engine import EngineJob, Example
from worker.trainer.bases import materialize_base
from worker.trainer.datasets import NumberedExample, tokenize_dataset
from worker.trainer.tokenizers import describe_tokenizer

BATCH_SIZE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    print(f"{machine()}\n$ {command()}\n\n| job | largest difference of a loss | relative difference of the update |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        base_dir = materialize_base("gguf", str(find_smollm2()), Path(scratch))
        jobs = [make_job(base_dir, modules, rank=rank, num_steps=steps) for modules, rank in DATA]
        losses = train_fused(base_dir, jobs, Path(scratch))
        for job in jobs:
            expected = train_with_peft(base_dir, job, Path(scratch) / job.slot_name)
            difference = max(abs(a - b) for a, b in zip(losses[job.slot_name], expected, strict=True))
            print(f"| {job.slot_name} | {difference:.1e} | {update_difference(Path(scratch) / job.slot_name):.1e} |")


DATA = ((("itertools", "functools", "statistics"), 16), (("shutil", "tempfile", "glob"), 8))


def make_job(base_dir: Path, modules: tuple[str, ...], *, rank: int, num_steps: int) -> EngineJob:
    documentation = build_documentation(modules, num_facts=num_steps * BATCH_SIZE // 2)
    rows = documentation.training.splitlines()[: num_steps * BATCH_SIZE]
    conversations = [
        NumberedExample(number, parse_example(row, line_number=number)) for number, row in enumerate(rows, start=1)
    ]
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    dataset = tokenize_dataset(BaseTokenizer(describe_tokenizer(tokenizer)), conversations, max_seq_len=512)
    spec = TrainingSpec(
        adapter=AdapterConfig(rank=rank, alpha=32, target_modules=MODULES),
        n_epochs=-(-num_steps * BATCH_SIZE // len(dataset.examples)),
        batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        max_seq_len=512,
        seed=rank,
    )
    return EngineJob("-".join(modules), spec, dataset.examples, tenant=modules[0])


def train_fused(base_dir: Path, jobs: list[EngineJob], scratch: Path) -> dict[str, list[float]]:
    """Train all jobs together; return their losses, and leave first and last weights in `scratch`."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    engine = make_engine(model, max_slots=len(jobs), max_tokens=2048)
    for job in jobs:
        engine.admit(job)
        for moment in ("first", "last"):
            (scratch / job.slot_name / moment).mkdir(parents=True)
        engine.export_adapter(job.slot_name, scratch / job.slot_name / "first")
    losses: dict[str, list[float]] = {job.slot_name: [] for job in jobs}
    while reports := engine.step():
        for report in reports:
            if report.update is not None:
                losses[report.slot_name].append(report.update.loss)
    for job in jobs:
        engine.export_adapter(job.slot_name, scratch / job.slot_name / "last")
    return losses


def train_with_peft(base_dir: Path, job: EngineJob, directory: Path) -> list[float]:
    """Train one job alone; return its losses, and leave the last weights in `directory`/peft."""
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(directory / "first"), is_trainable=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=job.spec.weight_decay)
    total, losses = count_steps(job.spec, len(job.examples)), list[float]()
    for epoch in range(job.spec.n_epochs):
        order = order_examples(job.spec.seed, epoch, len(job.examples))
        for start in range(0, len(order), BATCH_SIZE):
            loss = batch_loss(model, [job.examples[index] for index in order[start : start + BATCH_SIZE]])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, job.spec.max_grad_norm)
            optimizer.param_groups[0]["lr"] = learning_rate_at(job.spec, len(losses) + 1, total)
            optimizer.step()
            losses.append(loss.item())
    model.save_pretrained(str(directory / "peft"))
    return losses


def batch_loss(model: PeftModel, examples: list[Example]) -> torch.Tensor:
    """Return the mean over the batch's label tokens, one example at a time."""
    sums = []
    for example in examples:
        ids = torch.from_numpy(example.token_ids)[None]
        losses = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        sums.append(losses[torch.from_numpy(example.is_label[1:])].sum())
    return torch.stack(sums).sum() / sum(example.num_labels for example in examples)


def update_difference(directory: Path) -> float:
    first, last, peft = (
        load_file(directory / name / "adapter_model.safetensors") for name in ("first", "last", "peft")
    )
    ours = torch.cat([(last[name] - first[name]).flatten() for name in sorted(first)])
    theirs = torch.cat([(peft[name] - first[name]).flatten() for name in sorted(first)])
    return float((ours - theirs).norm() / theirs.norm())


if __name__ == "__main__":
    main()
