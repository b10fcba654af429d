"""Many jobs in one step against the same jobs by plain PEFT: `python -m bench.fused [--peers] [--rounds N]`.

Peers: (a) PEFT, one job after another on a hot base; (b) the same, each job's examples packed end to end; (c) as many
processes as jobs, each with its own base and PEFT. A line is the ratio of seconds, peer over fused, for the same
optimizer steps, measured in turns in one run: min / median / max over the rounds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.workload import (
    DEVICE,
    Base,
    PeftTrainer,
    command,
    llama3_8b,
    machine,
    make_engine,
    make_job,
    packed_batch,
    padded_batch,
    qwen3,
    roofline,
    seconds_of,
    smollm2_135m,
    spread,
)
from worker.engine import Engine, EngineJob


@dataclass(frozen=True)
class Point:
    """So many jobs, each with a batch of examples of these lengths."""

    base: Base
    num_jobs: int
    lengths: tuple[int, ...]

    @property
    def tokens_per_job(self) -> int:
        return sum(self.lengths)


def cpu_points() -> list[Point]:
    dense, nf4 = Base("SmolLM2-135M", smollm2_135m()), Base("SmolLM2-135M", smollm2_135m(), is_nf4=True)
    bf16 = Base("SmolLM2-135M", smollm2_135m(), dtype=torch.bfloat16)
    points = [Point(dense, jobs, (tokens,)) for jobs in (1, 2, 8) for tokens in (16, 64, 256)]
    points += [Point(nf4, jobs, (32,)) for jobs in (1, 4)] + [Point(nf4, 8, (128,)), Point(bf16, 8, (32,))]
    return [*points, Point(dense, 4, (10, 22, 35, 61)), Point(dense, 8, (10, 22, 35, 61))]


def cuda_points() -> list[Point]:
    half = torch.bfloat16
    small = Base("Qwen3-0.6B", qwen3(1024, 3072, 28, 16), dtype=half)
    middle = Base("Qwen3-1.7B", qwen3(2048, 6144, 28, 16), dtype=half)
    large = Base("Llama-3-8B", llama3_8b(), is_nf4=True, dtype=half)
    points = [
        Point(base, jobs, (tokens,)) for base in (small, middle) for jobs in (1, 8) for tokens in (256, 512, 2048)
    ]
    return points + [Point(large, jobs, (256,)) for jobs in (1, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", action="store_true", help="measure (b) and (c) too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    points = cuda_points() if DEVICE.type == "cuda" else cpu_points()
    if options.serve is not None:
        serve_peer(points[options.serve])
        return
    print(f"{machine()}\n$ {command()}\n")
    print("| base | jobs x tokens | (a) / fused | (b) / fused | (c) / fused | fused tokens/s | MFU |")
    print("|---|---|---|---|---|---|---|")
    for number, point in enumerate(points):
        print(measure(point, number, rounds=options.rounds, has_all_peers=options.peers), flush=True)


def measure(point: Point, number: int, *, rounds: int, has_all_peers: bool) -> str:
    jobs = [make_job(index, lengths=point.lengths, batch_size=len(point.lengths)) for index in range(point.num_jobs)]
    engine = make_engine(point.base.build(), max_slots=point.num_jobs, max_tokens=point.num_jobs * point.tokens_per_job)
    for job in jobs:
        engine.admit(job)
    peft = PeftTrainer(point.base.build())
    num_steps = max(2, min(6, 400 // (point.num_jobs * point.tokens_per_job // 8 + 1)))
    peers: dict[str, Callable[[], object]] = {"a": lambda: train_in_turn(peft, jobs, num_steps, is_packed=False)}
    processes = None
    if has_all_peers and point.num_jobs > 1:
        if len(point.lengths) > 1:
            peers["b"] = lambda: train_in_turn(peft, jobs, num_steps, is_packed=True)
        processes = PeerProcesses(number, point.num_jobs)
        peers["c"] = lambda: processes.train(num_steps)
    for warm_up in peers.values():
        warm_up()
    train_fused(engine, 2)
    ratios: dict[str, list[float]] = {name: [] for name in peers}
    fused_seconds = []
    for _ in range(rounds):
        seconds = {name: seconds_of(train) for name, train in peers.items()}
        fused_seconds.append(seconds_of(lambda: train_fused(engine, num_steps)))
        for name in peers:
            ratios[name].append(seconds[name] / fused_seconds[-1])
    if processes is not None:
        processes.close()
    return describe(point, ratios, min(fused_seconds) / num_steps, engine)


def describe(point: Point, ratios: dict[str, list[float]], step_seconds: float, engine: Engine) -> str:
    columns = [spread(ratios[name]) if name in ratios else "-" for name in "abc"]
    tokens = f"{point.num_jobs} x {point.tokens_per_job}" + (
        f" in {len(point.lengths)}" if len(point.lengths) > 1 else ""
    )
    rate = point.num_jobs * point.tokens_per_job / step_seconds
    return f"| {point.base.label} | {tokens} | {' | '.join(columns)} | {rate:.0f} | {roofline(engine, rate)} |"


def train_fused(engine: Engine, num_steps: int) -> None:
    for _ in range(num_steps):
        reports = engine.step()
        assert all(report.update is not None for report in reports), "a batch was cut"


def train_in_turn(peft: PeftTrainer, jobs: Sequence[EngineJob], num_steps: int, *, is_packed: bool) -> None:
    for job in jobs:
        batch = (packed_batch if is_packed else padded_batch)(job.examples)
        for _ in range(num_steps):
            peft.step(**batch)


class PeerProcesses:
    """One process a job, each with a base of its own, which all train at the same time when told.

    They share the cores out among them: threads that wait for each other on too few cores make them ten times slower.
    """

    def __init__(self, point_number: int, count: int) -> None:
        argv = [sys.executable, "-m", "bench.fused", "--serve", str(point_number)]
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": env}
        self._processes = [subprocess.Popen(argv, text=True, **pipes) for _ in range(count)]  # type: ignore[call-overload]
        self._await_all()

    def train(self, num_steps: int) -> None:
        for process in self._processes:
            process.stdin.write(f"{num_steps}\n")
            process.stdin.flush()
        self._await_all()

    def close(self) -> None:
        for process in self._processes:
            process.stdin.close()
            process.wait()

    def _await_all(self) -> None:
        for process in self._processes:
            assert process.stdout.readline(), "a peer has ended"


def serve_peer(point: Point) -> None:
    peft = PeftTrainer(point.base.build())
    batch = padded_batch(make_job(0, lengths=point.lengths, batch_size=len(point.lengths)).examples)
    peft.step(**batch)
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            peft.step(**batch)
        print("done", flush=True)


if __name__ == "__main__":
    main()
