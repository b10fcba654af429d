"""Renders rows with a base's chat template in a child process that the kernel ends at its limits.

A template is a program. jinja2's sandbox keeps it from the interpreter, but `9**(9**8)`, nested loops and a string of
half a gigabyte are all legal in it. So a child without credentials renders the rows. Its processor time and memory are
limited, it may write no file, it is killed after `wall_seconds`, and its answer is read up to a cap. The limits are in
force before the child reads its order, which carries the rows. `python -m core.previews` is this child.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from core.domain.datasets.statistics import NumberedLine, TokenReport, report_tokens
from core.domain.datasets.tokenizers import BaseTokenizer, TokenizerBundle
from core.domain.values import Frozen
from core.sandbox import die_with_parent, hide_secret_files, leave_root, plain_environment, shed_capabilities

_OUT_OF_MEMORY = 3
_NICENESS = 10  # requests come before previews


@dataclass(frozen=True)
class PreviewLimits:
    """For scale: loading a tokenizer takes about a second of processor time, and a megabyte of rows another."""

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory_bytes: int = 2**30
    answer_bytes: int = 8 * 2**20


DEFAULT_LIMITS = PreviewLimits()


class PreviewLimitError(Exception):
    """The rows could not be rendered within the limits. The message says which one."""


class _Order(Frozen):
    bundle_path: str
    max_seq_len: int
    num_shown: int
    lines: tuple[NumberedLine, ...]


def preview_lines(
    bundle_path: Path,
    lines: Sequence[NumberedLine],
    *,
    max_seq_len: int,
    num_shown: int,
    limits: PreviewLimits = DEFAULT_LIMITS,
) -> TokenReport:
    """Report on lines as the base of a bundle tokenises them. Raises PreviewLimitError."""
    order = _Order(
        bundle_path=str(bundle_path),
        max_seq_len=max_seq_len,
        num_shown=num_shown,
        lines=tuple(lines),
    )
    answer, exit_code = _run_child(order.model_dump_json().encode(), limits)
    if len(answer) > limits.answer_bytes:
        raise PreviewLimitError(f"The rows as tokens take more than {limits.answer_bytes} bytes; ask for fewer.")
    if exit_code == _OUT_OF_MEMORY:
        message = f"The rows, or the chat template, need more than {limits.memory_bytes >> 20} MiB of memory."
        raise PreviewLimitError(message)
    try:
        return TokenReport.model_validate_json(answer)
    except ValidationError as error:
        message = f"The chat template did not end within {limits.cpu_seconds} s, or broke its process ({exit_code})."
        raise PreviewLimitError(message) from error


def _run_child(order: bytes, limits: PreviewLimits) -> tuple[bytes, int]:
    """Return what the child wrote, up to one byte more than it may, and its exit code."""
    environment = plain_environment() | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "core.previews", str(limits.cpu_seconds), str(limits.memory_bytes)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    answer = b""
    # A child may end before it has read its order. The write then raises BrokenPipeError, and so does closing the pipe.
    with suppress(BrokenPipeError), subprocess.Popen(argv, env=environment, **pipes) as child:  # type: ignore[call-overload]
        os.setpriority(os.PRIO_PROCESS, child.pid, _NICENESS)
        timer = threading.Timer(limits.wall_seconds, child.kill)
        timer.name = "preview limit"
        timer.start()
        try:
            child.stdin.write(order)  # no deadlock: the child reads all of it before it writes
            child.stdin.close()
            answer = child.stdout.read(limits.answer_bytes + 1)
        finally:
            child.kill()
            timer.cancel()
    return answer, child.returncode


def _be_child(*, cpu_seconds: int, memory_bytes: int) -> None:
    die_with_parent()
    shed_capabilities()
    hide_secret_files()
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        order = _Order.model_validate_json(sys.stdin.buffer.read())
        bundle = TokenizerBundle.model_validate_json(Path(order.bundle_path).read_bytes())
        leave_root()
        report = report_tokens(
            BaseTokenizer(bundle), order.lines, max_seq_len=order.max_seq_len, num_shown=order.num_shown
        )
        sys.stdout.buffer.write(report.model_dump_json().encode())
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)


if __name__ == "__main__":
    _be_child(cpu_seconds=int(sys.argv[1]), memory_bytes=int(sys.argv[2]))
