"""How commands show a list page by page."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.output import is_json, say

Limit = Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")]
After = Annotated[str | None, typer.Option(help="Go on behind this one, the last of the page before.")]


def say_more(*, has_more: bool, last: str) -> None:
    """Print how to see the next page, after `last`."""
    if has_more and not is_json():
        say(f"There are more: --after {last}")
