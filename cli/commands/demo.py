"""`espalier demo`: the whole service, shown on a real base model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from cli.commands.stack import STACK_FAILURES, guard_secrets
from cli.demo.run import run_demo
from cli.output import fail, is_json, print_json
from cli.owner import DEFAULT_DATA_DIR, DataDir


def demo(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows and epochs: under three minutes.")] = False,
) -> None:
    """Fine-tune a real base model through the whole service and compare its answers before and after."""
    guard_secrets()
    try:
        # Progress is shown to people in any case, on standard error when a program reads standard output.
        jobs = run_demo(data_dir, is_quick=quick, console=Console(soft_wrap=True, emoji=False, stderr=is_json()))
    except STACK_FAILURES as error:
        fail(str(error))
    if is_json():
        for job in jobs:
            print_json(job.facts)
