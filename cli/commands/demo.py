"""`espalier demo`: the whole service, shown on a real base model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cli.commands.stack import STACK_FAILURES, guard_secrets
from cli.demo.run import run_demo
from cli.owner import DEFAULT_DATA_DIR, DataDir

console = Console(soft_wrap=True)


def demo(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows and epochs: under three minutes.")] = False,
) -> None:
    """Fine-tune a real base model through the whole service and compare its answers before and after."""
    guard_secrets()
    try:
        run_demo(data_dir, is_quick=quick, console=console)
    except STACK_FAILURES as error:
        console.print(f"[red]{escape(str(error))}[/]")
        raise typer.Exit(1) from error
