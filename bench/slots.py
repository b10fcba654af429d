"""The memory that one more job takes: `python -m bench.slots`.

The closed form is 16 bytes for each LoRA parameter (weight, gradient, two moments), and for each token of the batch the
activations that the engine's own probe predicts. Jobs are admitted one by one, with one step of all after each.
Measured are the bytes held after the step and the step's peak: on a GPU by torch's allocator, on a CPU as the process's
resident memory. A line is the increase by the last jobs, for each of them, over the closed form.
"""

from __future__ import annotations

import ctypes
import gc
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.workload import (
    DEVICE,
    Base,
    command,
    llama3_8b,
    machine,
    make_engine,
    make_job,
    qwen3,
    smollm2_135m,
)
from worker.engine import Engine

_NUM_JOBS = 8
_M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True)
class Memory:
    """Bytes held after a step, and the most that was held in it."""

    held: int
    peak: int


def points() -> list[tuple[Base, int]]:
    if DEVICE.type == "cuda":
        half = torch.bfloat16
        return [
            (Base("Qwen3-0.6B", qwen3(1024, 3072, 28, 16), dtype=half), 512),
            (Base("Llama-3-8B", llama3_8b(), is_nf4=True, dtype=half), 256),
        ]
    return [(Base("SmolLM2-135M", smollm2_135m()), tokens) for tokens in (16, 256)]


def main() -> None:
    # So that what torch frees leaves the process at once: glibc would keep it, in pieces, and count as a job's.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**17)
    print(f"{machine()}\n$ {command()}\n")
    print("| base | jobs x tokens | bytes a LoRA parameter and job | held / closed form | peak / closed form |")
    print("|---|---|---|---|---|")
    for base, num_tokens in points():
        print(measure(base, num_tokens), flush=True)


def measure(base: Base, num_tokens: int) -> str:
    engine = make_engine(base.build(), max_slots=_NUM_JOBS, max_tokens=_NUM_JOBS * num_tokens)
    taken = [step_with_one_more(engine, number, num_tokens) for number in range(_NUM_JOBS)]
    # The first jobs also pay for what is made once: code, pools of threads, workspaces.
    first, last, num_added = taken[1], taken[-1], _NUM_JOBS - 2
    num_parameters = engine._slots["0"].row.bank.layout.num_parameters  # noqa: SLF001
    slot_bytes = 16 * num_parameters
    step_bytes = slot_bytes + engine._memory.predict(num_tokens) - engine._memory.predict(0)  # noqa: SLF001
    held, peak = (last.held - first.held) / num_added, (last.peak - first.peak) / num_added
    return (
        f"| {base.label} | {_NUM_JOBS} x {num_tokens} | {held / num_parameters:.1f} "
        f"| {held / slot_bytes:.2f} | {peak / step_bytes:.2f} |"
    )


def step_with_one_more(engine: Engine, number: int, num_tokens: int) -> Memory:
    engine.admit(make_job(number, lengths=(num_tokens,)))
    engine.step()
    return measure_step(engine)


def measure_step(engine: Engine) -> Memory:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        engine.step()
        return Memory(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    engine.step()
    peak = resident_bytes("VmHWM")
    ctypes.CDLL(None).malloc_trim(0)
    return Memory(resident_bytes("VmRSS"), peak)


def resident_bytes(counter: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{counter}:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
