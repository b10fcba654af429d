"""The values of a dataset and of its check. They are plain, and safe to store as text and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ChatMessage:
    """One turn. With `weight` 0 an assistant's turn is context only and not learnt."""

    role: str
    content: str
    weight: int = 1


@dataclass(frozen=True)
class ChatExample:
    """One conversation. At least one assistant message has weight 1."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row: its line (1 is the first), where in the row, and what to change.

    `path` is the way to a field, such as `messages[1].role`, or the column at which a line stops being JSON.
    """

    line: int
    path: str
    code: str
    message: str
    hint: str


class ProblemError(Exception):
    """A row that cannot be trained on."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(_describe(problem))
        self.problem = problem

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.problem,))


class ForeignFileError(ProblemError):
    """The file has another format. Nothing more can be said about its other lines."""


@dataclass(frozen=True)
class DatasetLimits:
    """The limits of one upload. `max_problems` are kept; `max_counted_problems` end the reading of rows.

    The first `max_compared` rows are compared with one another. Only their hashes are kept.
    """

    max_line_bytes: int = 2**20
    max_examples: int = 10_000_000
    max_depth: int = 16
    max_messages: int = 1000
    max_problems: int = 100
    max_counted_problems: int = 10_000
    max_compared: int = 200_000


@dataclass(frozen=True)
class DatasetReport:
    """The result of a check. `problems` has the first ones, `num_problems` counts all, `problem_counts` counts by code.

    `num_duplicates` of the first `num_compared` good rows repeat an earlier one exactly. `is_complete` is False if the
    rest of the rows was not read, because of too many problems or because the file has another format.
    """

    num_examples: int
    size_bytes: int
    problems: tuple[Problem, ...]
    num_problems: int
    is_complete: bool = True
    problem_counts: Mapping[str, int] = field(default_factory=dict)
    num_duplicates: int = 0
    num_compared: int = 0

    @property
    def counts(self) -> dict[str, Any]:
        """All counts, JSON-ready."""
        return {
            "num_problems": self.num_problems,
            "problem_counts": dict(self.problem_counts),
            "is_complete": self.is_complete,
            "num_duplicates": self.num_duplicates,
            "num_compared": self.num_compared,
        }

    @property
    def is_valid(self) -> bool:
        return self.num_problems == 0

    def summarize(self) -> str | None:
        """Return the first problem in one sentence, with the number of the others, or None without problems."""
        if self.is_valid:
            return None
        num_others = self.num_problems - 1
        if not num_others:
            return _describe(self.problems[0])
        at_least = "" if self.is_complete else "at least "
        plural = "s" if num_others > 1 else ""
        others = f"{at_least}{num_others} more problem{plural}"
        first = _describe(self.problems[0])  # a hint may be a command, which ends without a full stop
        return f"{first} And {others}." if first.endswith(".") else f"{first} (and {others})"


def _describe(problem: Problem) -> str:
    where = f"Line {problem.line}" + (f", {problem.path}" if problem.path else "")
    return f"{where}: {problem.message} {problem.hint}"
