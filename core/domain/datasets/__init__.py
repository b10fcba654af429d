"""Datasets: JSON Lines of conversations, checked line by line as they stream in, in constant memory.

The API checks an upload with `DatasetChecker`. The trainer reads the same rows with `iterate_rows` and `parse_example`.
Both use the same rules, so a file that was accepted can be trained on.
"""

from core.domain.datasets.checker import DatasetChecker
from core.domain.datasets.foreign import FOREIGN_FORMAT
from core.domain.datasets.rows import ROLES, iterate_rows, parse_example
from core.domain.datasets.values import (
    ChatExample,
    ChatMessage,
    DatasetLimits,
    DatasetReport,
    Problem,
    ProblemError,
)

__all__ = [
    "FOREIGN_FORMAT",
    "ROLES",
    "ChatExample",
    "ChatMessage",
    "DatasetChecker",
    "DatasetLimits",
    "DatasetReport",
    "Problem",
    "ProblemError",
    "iterate_rows",
    "parse_example",
]
