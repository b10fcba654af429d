"""The result of a check, and what checks share. A check never raises: an error is its finding."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FindingState(StrEnum):
    """The result of a check. `skipped`: it could not be made from here, for lack of a setting or a right."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line: what was checked, its state, and what to do if something is wrong."""

    check: str
    state: FindingState
    says: str
    remedy: str = ""


def ok(check: str, says: str) -> Finding:
    return Finding(check, FindingState.OK, says)


def warning(check: str, says: str, *, remedy: str) -> Finding:
    return Finding(check, FindingState.WARNING, says, remedy)


def failed(check: str, says: str, *, remedy: str) -> Finding:
    return Finding(check, FindingState.FAILED, says, remedy)


def skipped(check: str, says: str, *, remedy: str = "") -> Finding:
    return Finding(check, FindingState.SKIPPED, says, remedy)
