"""What a check found, and the little that checks share. A check never raises: what goes wrong is what it found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FindingState(StrEnum):
    """`skipped` is what could not be looked at from here, for want of a setting or a right."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do where it is not well."""

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
