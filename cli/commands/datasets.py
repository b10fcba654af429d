"""`espalier validate`: checks a dataset as an upload is checked, and counts its tokens, without the service."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.output import fail, is_json, print_json
from cli.owner import DEFAULT_DATA_DIR, DataDir
from core.domain.datasets import FOREIGN_FORMAT, DatasetChecker, DatasetReport, iterate_rows
from core.domain.datasets.statistics import NumberedLine, TokenReport
from core.domain.datasets.tokenizers import tokenizer_path
from core.domain.errors import PayloadTooLargeError
from core.previews import PreviewLimitError, PreviewLimits, preview_lines

_CHUNK_BYTES = 2**20
_PART_ROWS = 2000
_LIMITS = PreviewLimits(cpu_seconds=60, wall_seconds=120.0)
_INVALID, _CANNOT_SAY = 1, 2

console = Console(soft_wrap=True, emoji=False)


def validate(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A JSON Lines file of conversations.")],
    base_model: Annotated[
        str | None, typer.Option(help="Count tokens as this base model sees them; a local worker must have loaded it.")
    ] = None,
    max_seq_len: Annotated[int, typer.Option(min=8, help="Rows longer than this lose their tail.")] = 2048,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Check a dataset as an upload is checked. Exit code 0: it can be trained on; 1: it cannot; 2: cannot say."""
    try:
        report = _check(file)
    except PayloadTooLargeError as error:
        fail(error.message, exit_code=_INVALID)
    if not is_json():
        _show_report(report)
    tokens = None
    if report.is_valid and base_model is not None:
        tokens = _count_tokens(file, tokenizer_path(data_dir / "cache", base_model), max_seq_len)
        if not is_json():
            _show_tokens(tokens)
    is_trainable = report.is_valid and (tokens is None or _is_trainable(tokens))
    if is_json():
        print_json({"is_valid": is_trainable, "report": report, "tokens": tokens})
    if not is_trainable:
        raise typer.Exit(_INVALID)


def _is_trainable(tokens: TokenReport) -> bool:
    return not tokens.num_problems and tokens.num_nothing_to_learn < tokens.num_rows


def _check(file: Path) -> DatasetReport:
    checker = DatasetChecker()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            checker.feed(chunk)
    return checker.close()


def _count_tokens(file: Path, bundle_path: Path, max_seq_len: int) -> TokenReport:
    if not bundle_path.exists():
        reason = f"There is no tokenizer at {bundle_path}: no worker of this data directory has loaded it."
        fail(reason, exit_code=_CANNOT_SAY)
    try:
        return TokenReport.joined(
            preview_lines(bundle_path, part, max_seq_len=max_seq_len, num_shown=0, limits=_LIMITS)
            for part in _iterate_parts(file)
        )
    except PreviewLimitError as error:
        fail(str(error), exit_code=_CANNOT_SAY)


def _iterate_parts(file: Path) -> Iterator[list[NumberedLine]]:
    with file.open("rb") as content:
        lines = (NumberedLine(number=number, content=line) for number, line in iterate_rows(content))
        while part := list(islice(lines, _PART_ROWS)):
            yield part


def _show_report(report: DatasetReport) -> None:
    state = "[green]It can be trained on.[/]" if report.is_valid else "[red]It cannot be trained on.[/]"
    console.print(f"Good rows: {report.num_examples}. Problems: {report.num_problems}. {state}")
    if report.num_duplicates:
        console.print(f"{report.num_duplicates} of the first {report.num_compared} good rows repeat an earlier one.")
    if not report.problems:
        return
    table = Table("line", "where", "code", "problem", "what to do")
    for problem in report.problems:
        is_command = problem.code == FOREIGN_FORMAT
        hint = "Convert the file: see below." if is_command else problem.hint
        table.add_row(str(problem.line), *map(escape, (problem.path, problem.code, problem.message, hint)))
    console.print(table)
    for code, count in sorted(report.problem_counts.items()):
        console.print(f"  {count:>7}  {code}")
    # A command is copied into a shell, so it gets its own line, whatever the width of the terminal.
    for command in dict.fromkeys(problem.hint for problem in report.problems if problem.code == FOREIGN_FORMAT):
        console.print(f"\nTo convert it:\n{command}", markup=False, highlight=False)


def _show_tokens(report: TokenReport) -> None:
    console.print(
        f"{report.num_tokens} tokens an epoch, {report.num_learnt_tokens} of them learnt; the longest row has "
        f"{report.longest_row_tokens}. {report.num_truncated} rows are longer than {report.max_seq_len} and lose their "
        f"tail; {report.num_nothing_to_learn} of all have nothing left to learn."
    )
    if report.num_left_out_turns:
        console.print(
            f"{report.num_left_out_turns} answers are not learnt: a server would not ask this base for them in the "
            "context that its chat template gives them here."
        )
    table = Table("tokens up to", "rows")
    for bucket in report.histogram:
        table.add_row(str(bucket.max_tokens), str(bucket.num_rows))
    console.print(table)
    for problem in report.problems:
        console.print(f"[red]Line {problem.line}:[/] {escape(problem.message)}")
