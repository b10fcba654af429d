"""Lines of a stored file are read within bounds, because the lines after many problems were never checked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from api.previews import MAX_LINE_BYTES, iterate_lines
from core.domain.errors import InvalidRequestError

CHUNK = b"x" * 2**16


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([], []),
        ([b"a\nb"], [b"a", b"b"]),
        ([b"a", b"b\n", b"\nc\n"], [b"ab", b"", b"c"]),
        ([b"x" * MAX_LINE_BYTES + b"\n", b"y"], [b"x" * MAX_LINE_BYTES, b"y"]),
    ],
)
def test_lines_are_those_of_the_file_however_it_is_cut(chunks: list[bytes], lines: list[bytes]) -> None:
    assert list(iterate_lines(chunks)) == lines


def test_an_endless_line_is_given_up_when_it_is_too_long_and_no_more_is_read() -> None:
    num_read = 0

    def endless() -> Iterator[bytes]:
        nonlocal num_read
        yield b"first\n"
        while num_read < 64 * MAX_LINE_BYTES:
            num_read += len(CHUNK)
            yield CHUNK

    lines = iterate_lines(endless())
    assert next(lines) == b"first"
    with pytest.raises(InvalidRequestError, match="Line 2 is longer") as refused:
        next(lines)
    assert refused.value.param == "from_line"
    assert num_read <= MAX_LINE_BYTES + len(CHUNK)
