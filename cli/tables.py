"""Tables for people. Long text is folded where a reader would fold it, and nothing is cut.

| text | folds |
|---|---|
| a heading | at its spaces only |
| a value | after `/`, `-`, `@`, `_`, `,` or a space |
| a value, if nothing else makes the table fit | inside a word |

The least important columns are left out before a row has more than `MAX_LINES` lines. On a terminal narrower than
`FULL_COLUMNS` they are left out before anything folds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

FULL_COLUMNS = 100
MAX_LINES = 3
_GAP = 2
_LINES = re.compile(r".+")
_PIECES = re.compile(r"[^/\-@_, \n]+[/\-@_, ]?|[/\-@_, ]")
_WORDS = re.compile(r"[^ \n]+ ?| ")


@dataclass(frozen=True)
class Column:
    """A column of a table: its field, its heading, and how it yields when there is little room.

    A column with `is_whole` is not folded. Of those with `leaves_at` (1 or more) the lowest is left out first.
    """

    key: str
    heading: str = ""
    is_whole: bool = False
    leaves_at: int = 0

    @property
    def title(self) -> str:
        return self.heading or self.key.replace("_", " ")


@dataclass(frozen=True)
class Table:
    """Columns, and rows of as many texts. It is laid out when it is printed, for the width at that time."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self._fit(options.max_width)
        table = RichTable(box=None, pad_edge=False)
        for column in shown:
            table.add_column("\n".join(map(escape, column.heading)), width=column.width, overflow="fold")
        for cells in zip(*(column.cells for column in shown), strict=True):
            table.add_row(*(Text("\n".join(lines)) for lines in cells))
        yield table

    def _fit(self, width: int) -> list[_Laid]:
        shown = [_lay(each, [row[place] for row in self.rows]) for place, each in enumerate(self.columns)]
        max_lines = 1 if width < FULL_COLUMNS else MAX_LINES
        while True:
            fitted = _narrow(shown, width)
            leaving = min(filter(_may_leave, shown), key=_may_leave, default=None)
            if leaving is None or max(_heights(fitted), default=1) <= max_lines:
                return fitted
            shown.remove(leaving)


@dataclass(frozen=True)
class _Laid:
    """A laid out column: the lines of its heading and cells, and the widths below which words are cut."""

    column: Column
    values: Sequence[str]
    heading: list[str]
    cells: list[list[str]]
    least: int
    least_word: int

    @cached_property
    def width(self) -> int:
        return max(cell_len(line) for lines in (self.heading, *self.cells) for line in lines)

    @cached_property
    def narrowed(self) -> _Laid:
        """The same column at the next smaller width that makes a difference."""
        heading = _fold(_WORDS, self.column.title, self.width - 1)
        return replace(self, heading=heading, cells=[_fold(_PIECES, each, self.width - 1) for each in self.values])


def _lay(column: Column, values: Sequence[str]) -> _Laid:
    heading, cells = column.title.split("\n"), [each.split("\n") for each in values]
    least_word = max(1, _longest(_WORDS, [column.title]))
    least = _longest(_LINES if column.is_whole else _PIECES, values)
    return _Laid(column, values, heading, cells, max(least_word, least), least_word)


def _narrow(shown: Sequence[_Laid], width: int) -> list[_Laid]:
    """Return columns narrowed until they fit. Each step takes the one that makes the table least longer."""
    fitted = list(shown)
    while _width(fitted) > width and (places := _places_to_narrow(fitted)):
        folded = {place: [*fitted[:place], fitted[place].narrowed, *fitted[place + 1 :]] for place in places}
        costs = {place: (sum(_heights(each)), -fitted[place].width) for place, each in folded.items()}
        fitted = folded[min(places, key=costs.__getitem__)]
    return fitted


def _heights(shown: Sequence[_Laid]) -> list[int]:
    """Return the number of lines of each row."""
    return [max(map(len, cells)) for cells in zip(*(each.cells for each in shown), strict=True)]


def _may_leave(laid: _Laid) -> int:
    return laid.column.leaves_at


def _width(shown: Sequence[_Laid]) -> int:
    return sum(each.width for each in shown) + _GAP * (len(shown) - 1)


def _places_to_narrow(shown: Sequence[_Laid]) -> list[int]:
    """Return the columns that fold between words, else those that fold within, else those that should stay whole."""
    between = [place for place, each in enumerate(shown) if each.width > each.least]
    within = [place for place, each in enumerate(shown) if each.width > each.least_word]
    return between or [place for place in within if not shown[place].column.is_whole] or within


def _fold(pattern: re.Pattern[str], text: str, width: int) -> list[str]:
    """Return a text in lines of at most `width`. A piece longer than a line is cut into several."""
    return [folded for line in text.split("\n") for folded in _fold_line(pattern, line, width)]


def _fold_line(pattern: re.Pattern[str], line: str, width: int) -> list[str]:
    lines = [""]
    for piece in pattern.findall(line):
        for part in chop_cells(piece, width) if cell_len(piece.rstrip()) > width else [piece]:
            if cell_len((lines[-1] + part).rstrip()) > width:
                lines.append("")
            lines[-1] += part
    return [folded.rstrip() for folded in lines]


def _longest(pattern: re.Pattern[str], texts: Iterable[str]) -> int:
    return max((cell_len(piece.rstrip()) for text in texts for piece in pattern.findall(text)), default=0)
