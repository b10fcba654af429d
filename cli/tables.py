"""How commands print rows: a table as wide as the terminal, uncut in a file or a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_UNCUT_WIDTH = 1000


def print_table(columns: Iterable[str], rows: Iterable[list[Any]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(_text(value)) for value in row))
    # A file or a pipe has no width: nothing is cut for it.
    Console(width=None if sys.stdout.isatty() else _UNCUT_WIDTH).print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
