"""Previews of rows: fetch the base's tokenizer once, read the rows, and render them in a child process with limits.

A file with many problems is stored without a check of its later lines, so a line may have any length.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from core.domain.datasets import DatasetLimits, iterate_rows
from core.domain.datasets.statistics import NumberedLine, TokenReport
from core.domain.errors import InvalidRequestError
from core.previews import PreviewLimitError, preview_lines
from core.scratch import scratch_directory
from core.storage import ObjectStore

MAX_ROWS = 2000
MAX_ROW_BYTES = 2 * 2**20
MAX_LINE_BYTES = DatasetLimits().max_line_bytes
assert MAX_LINE_BYTES <= MAX_ROW_BYTES, "any line that a dataset may have can be previewed"
_MAX_SKIPPED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PreviewOrder:
    """Which rows of which object to render, with which tokenizer."""

    object_key: str
    tokenizer_key: str
    from_line: int
    num_shown: int
    max_seq_len: int


@dataclass(frozen=True)
class Preview:
    """`report` counts the rows that were read. `is_whole_file` says whether they are all rows of the file."""

    report: TokenReport
    is_whole_file: bool


class Previewer:
    """Renders previews. Each costs a process and about a second of a processor. A gate limits how many run at once."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._exits = ExitStack()

    def close(self) -> None:
        """Remove the tokenizers that were fetched."""
        self._exits.close()

    def preview(self, order: PreviewOrder, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_ROW_BYTES) -> Preview:
        """Render rows. Raises InvalidRequestError for rows that do not exist or pass a limit."""
        lines, is_whole_file = self._read_lines(order, max_rows=max_rows, max_bytes=max_bytes)
        if not lines:
            raise InvalidRequestError(f"The file has no line {order.from_line}.", param="from_line")
        bundle_path = self._fetch_tokenizer(order.tokenizer_key)
        try:
            report = preview_lines(bundle_path, lines, max_seq_len=order.max_seq_len, num_shown=order.num_shown)
        except PreviewLimitError as error:
            raise InvalidRequestError(str(error), code="preview_limit") from error
        return Preview(report, is_whole_file)

    @cached_property
    def _directory(self) -> Path:
        return self._exits.enter_context(scratch_directory("api", Path(tempfile.gettempdir())))

    def _fetch_tokenizer(self, object_key: str) -> Path:
        path = self._directory / object_key.rpartition("/")[2]
        if not path.exists():
            descriptor, unfinished = tempfile.mkstemp(dir=self._directory)
            with os.fdopen(descriptor, "wb") as out:
                out.writelines(self._store.get_stream(object_key))
            Path(unfinished).replace(path)
        return path

    def _read_lines(self, order: PreviewOrder, *, max_rows: int, max_bytes: int) -> tuple[list[NumberedLine], bool]:
        """Return the lines from `from_line` on within the limits, at least one, and whether they are the whole file."""
        kept: list[NumberedLine] = []
        num_skipped_bytes = num_kept_bytes = 0
        for number, content in iterate_rows(iterate_lines(self._store.get_stream(order.object_key))):
            if number < order.from_line:
                num_skipped_bytes += len(content)
                if num_skipped_bytes > _MAX_SKIPPED_BYTES:
                    raise InvalidRequestError(f"Line {order.from_line} is too far into the file.", param="from_line")
                continue
            if len(kept) == max_rows or (kept and num_kept_bytes + len(content) > max_bytes):
                return kept, False
            kept.append(NumberedLine(number=number, content=content))
            num_kept_bytes += len(content)
        return kept, order.from_line == 1


def iterate_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines. Raises InvalidRequestError as soon as one is longer than a line of a dataset may be."""
    pending, number = bytearray(), 1
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            _extend_line(pending, end, number=number)
            yield bytes(pending)
            pending.clear()
            number += 1
        _extend_line(pending, rest, number=number)
    if pending:
        yield bytes(pending)


def _extend_line(pending: bytearray, part: bytes, *, number: int) -> None:
    if len(pending) + len(part) > MAX_LINE_BYTES:
        message = f"Line {number} is longer than {MAX_LINE_BYTES} bytes: no preview can reach it."
        raise InvalidRequestError(message, code="line_too_long", param="from_line")
    pending += part
