"""The output of commands: sentences and tables for people, or JSON for programs with `--json`.

With `--json` standard output contains only JSON: one document, or one object a line if a command lists things or
reports events. An error is then the document `{"error": ...}`; otherwise it is one line on standard error.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType

from cli.tables import FULL_COLUMNS, Column, Table

_is_json: ContextVar[bool] = ContextVar("is_json", default=False)


@contextmanager
def output_mode(*, is_json: bool) -> Iterator[None]:
    token = _is_json.set(is_json)
    try:
        yield
    finally:
        _is_json.reset(token)


def is_json() -> bool:
    """Say whether the running command was called with `--json`."""
    return _is_json.get()


def say(sentence: str, *, style: str = "", **facts: Any) -> None:
    """Print a sentence. As JSON, print the facts in it, or the sentence itself if no facts are given."""
    if is_json():
        print_json(facts or {"message": sentence})
    else:
        _plain_console().print(sentence, style=style)


def show(picture: RenderableType) -> None:
    """Print something that is for people only, such as one of rich's panels or tables."""
    if not is_json():
        Console(width=find_width(), emoji=False).print(picture)


def tell(sentence: str) -> None:
    """Report a command's progress on standard error, apart from its results."""
    _plain_console(is_error=True).print(" ".join(sentence.split()), style="dim")


def fail(reason: str, *, exit_code: int = 1) -> NoReturn:
    """End the command with one line that says why."""
    line = " ".join(reason.split())
    if is_json():
        print_json({"error": {"message": line}})
    else:
        _plain_console(is_error=True).print(line, style="red")
    raise typer.Exit(exit_code)


def print_rows(columns: Iterable[str | Column], rows: Iterable[Mapping[str, Any]]) -> None:
    """Print rows as a table of these columns. As JSON, print one object a row, with all of its fields."""
    if is_json():
        for row in rows:
            print_json(row)
        return
    show(make_table(columns, rows))


def make_table(columns: Iterable[str | Column], rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return a table that folds long cells to the available width, and cuts nothing."""
    named = tuple(each if isinstance(each, Column) else Column(each) for each in columns)
    return Table(named, tuple(tuple(as_text(row[column.key]) for column in named) for row in rows))


def fields_of(row: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def find_width() -> int | None:
    """Return the width of tables: None for the terminal's, and in a file or pipe a width that any editor can show."""
    return None if sys.stdout.isatty() else FULL_COLUMNS


def print_json(value: Any) -> None:
    print(json.dumps(value, default=_as_json, ensure_ascii=False), flush=True)


def as_text(value: Any) -> str:
    """Return a value as the text of a table's cell: instants in UTC to the second, numbers to two digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dt.datetime):
        return value.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    if isinstance(value, dict):
        return json.dumps(value, default=_as_json)
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def as_duration(seconds: float | None) -> str:
    """Return a duration in its largest two units: 42s, 3m10s, 2h05m, 4d03h."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02}{smaller}"
    return f"{whole}s"


def _plain_console(*, is_error: bool = False) -> Console:
    """Return a console that prints sentences literally: `[x]` is no markup in them, and `:abc:` no emoji."""
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False, stderr=is_error)


def _as_json(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dt.datetime):
        return value.astimezone(dt.UTC).isoformat()
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
