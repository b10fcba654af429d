"""Checks a dataset while it streams in. Holds at most one line in memory, and never more of it than the cap.

A problem with a row is collected and reported with its line number. Only a file that exceeds a cap is refused at once.
"""

from __future__ import annotations

from collections import Counter

from core.domain.datasets.foreign import HEAD_BYTES
from core.domain.datasets.rows import explain_first_line, is_blank, parse_example
from core.domain.datasets.values import DatasetLimits, DatasetReport, ForeignFileError, Problem, ProblemError
from core.domain.errors import PayloadTooLargeError

_DEFAULT_LIMITS = DatasetLimits()


class DatasetChecker:
    """Checks a stream of bytes, fed in chunks of any size. The result does not depend on the chunks.

    Only a line feed ends a line: a carriage return before it is white space, and U+2028 is text. As in `iterate_rows`,
    the last line may lack its line feed, and blank lines may follow it. The reading of rows ends at
    `max_counted_problems`, because a file full of problems must not cost more than a good one. It ends at line 1 if
    this line shows another format.
    """

    def __init__(self, limits: DatasetLimits = _DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._pending = bytearray()
        self._line_number = 0
        self._num_blank = 0  # blank lines up to this one; they are a problem only if a row follows
        self._is_foreign = False
        self._size_bytes = 0
        self._num_examples = 0
        self._num_problems = 0
        self._problems: list[Problem] = []
        self._codes: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._num_compared = self._num_duplicates = 0

    def feed(self, chunk: bytes) -> None:
        """Check the lines that `chunk` completes. Raises PayloadTooLargeError for a line or a file beyond its cap."""
        self._size_bytes += len(chunk)
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            if not self._is_reading:
                return
            self._extend_line(part)
            if self._is_reading:
                self._check_line()
        if self._is_reading:
            self._extend_line(rest)

    def close(self) -> DatasetReport:
        """Check what follows the last line feed, and return the report."""
        if self._pending and self._is_reading:
            self._check_line(ends_file=True)
        if not self._num_examples and not self._num_problems:
            self._add(Problem(1, "", "no_examples", "The file has no examples.", "Give one JSON object a line."))
        return DatasetReport(
            num_examples=self._num_examples,
            size_bytes=self._size_bytes,
            problems=tuple(self._problems),
            num_problems=self._num_problems,
            is_complete=self._is_reading,
            problem_counts=dict(self._codes),
            num_duplicates=self._num_duplicates,
            num_compared=self._num_compared,
        )

    @property
    def _is_reading(self) -> bool:
        return not self._is_foreign and self._num_problems < self._limits.max_counted_problems

    def _extend_line(self, part: bytes) -> None:
        if len(self._pending) + len(part) > self._limits.max_line_bytes:
            self._give_up_line(part)
        else:
            self._pending += part

    def _give_up_line(self, part: bytes) -> None:
        """Refuse the upload for a line beyond the cap, unless it is the first line of a file of another format."""
        num_bytes = min(HEAD_BYTES, self._limits.max_line_bytes)
        head = (bytes(self._pending[:num_bytes]) + part[:num_bytes])[:num_bytes]
        foreign = explain_first_line(head) if self._line_number == 0 else None
        if foreign is None:
            raise PayloadTooLargeError(
                f"Line {self._line_number + 1} is longer than {self._limits.max_line_bytes} bytes. "
                "Split the conversation, or check that every example stands on a line of its own.",
                code="line_too_long",
                param="file",
            )
        self._add_error(foreign)

    def _check_line(self, *, ends_file: bool = False) -> None:
        line = bytes(self._pending)
        self._pending.clear()
        self._line_number += 1
        if is_blank(line, line_number=self._line_number):
            self._num_blank += 1
            return
        self._refuse_blank_lines()
        if not self._is_reading:
            return
        try:
            parse_example(line, line_number=self._line_number, limits=self._limits, ends_file=ends_file)
        except ProblemError as error:
            self._add_error(error)
        else:
            self._count_example(line)

    def _refuse_blank_lines(self) -> None:
        """Add a problem for every blank line before this one, now that a row follows them."""
        for line_number in range(self._line_number - self._num_blank, self._line_number):
            if not self._is_reading:
                break
            try:
                parse_example(b"", line_number=line_number)
            except ProblemError as error:
                self._add_error(error)
        self._num_blank = 0

    def _count_example(self, line: bytes) -> None:
        self._num_examples += 1
        if self._num_compared < self._limits.max_compared:
            self._num_compared += 1
            self._seen.add(hash(line.strip()))  # 64 bits, a new key in every process: no forged collisions
            self._num_duplicates = self._num_compared - len(self._seen)
        if self._num_examples > self._limits.max_examples:
            raise PayloadTooLargeError(
                f"The file has more than {self._limits.max_examples} examples. Split it.",
                code="too_many_examples",
                param="file",
            )

    def _add_error(self, error: ProblemError) -> None:
        self._is_foreign = isinstance(error, ForeignFileError)
        self._add(error.problem)

    def _add(self, problem: Problem) -> None:
        self._num_problems += 1
        self._codes[problem.code] += 1
        if len(self._problems) < self._limits.max_problems:
            self._problems.append(problem)
