"""The time from submitting a job to its first optimizer step on a hot worker: `python -m bench.hot_start [--rounds N]`.

The whole service runs on real servers with SmolLM2-135M-Instruct. A job is submitted through the `openai` client and
followed until its first step is in its events. That includes the queue, the claim, fetching and tokenising eight rows,
and the step. The peer is the cost where every job starts a process: Python, the base from the same files, PEFT, and the
same first step. Measured in turns: min / median / max.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.workload import PeftTrainer, command, machine, spread
from local.stack import LocalStack
from tests.waiting import wait_until

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONVERSATIONS = [
    [{"role": "user", "content": f"What is {n} times seven?"}, {"role": "assistant", "content": f"It is {7 * n}."}]
    for n in range(8)
]
_TIMEOUT_SECONDS = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cold is not None:
        take_first_step(options.cold)
        return
    print(f"{machine()}\n$ {command()}\n")
    with tempfile.TemporaryDirectory() as scratch, LocalStack(Path(scratch)) as stack:
        client = OpenAI(base_url=f"{stack.api_url}/v1", api_key=stack.create_tenant("bench"))
        rows = "\n".join(json.dumps({"messages": messages}) for messages in CONVERSATIONS).encode()
        file_id = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id
        time_first_step(client, file_id)  # loads the base
        base_dir = next((Path(scratch) / "cache" / "bases").iterdir())
        hot, cold = [], []
        for _ in range(options.rounds):
            cold.append(time_cold_start(base_dir))
            hot.append(time_first_step(client, file_id))
    ratios = [slow / fast for slow, fast in zip(cold, hot, strict=True)]
    print("| hot worker, seconds | a process a job, seconds | ratio |\n|---|---|---|")
    print(f"| {spread(hot)} | {spread(cold)} | {spread(ratios)} |")


def time_first_step(client: OpenAI, file_id: str) -> float:
    """Return the seconds from submitting a job to seeing its first step, and wait for its end."""
    started = time.perf_counter()
    job = client.fine_tuning.jobs.create(
        model=BASE_MODEL, training_file=file_id, hyperparameters={"n_epochs": 1, "batch_size": 8}
    )
    while not any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id).data):
        assert time.perf_counter() - started < _TIMEOUT_SECONDS, "no step was taken"
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status != "running", what="the end of the job")
    return seconds


def time_cold_start(base_dir: Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bench.hot_start", "--cold", str(base_dir)], check=True)
    return time.perf_counter() - started


def take_first_step(base_dir: Path) -> None:
    """Be the process that one job starts."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer.apply_chat_template(CONVERSATIONS, return_dict=True, return_tensors="pt", padding=True)
    trainer = PeftTrainer(AutoModelForCausalLM.from_pretrained(base_dir))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    trainer.step(batch["input_ids"], labels, attention_mask=batch["attention_mask"])


if __name__ == "__main__":
    main()
