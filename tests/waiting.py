"""How tests handle time: the only module in which they read a clock.

A test never fails because the machine was busy. A wait ends only what would never end, so its patience is long: it
costs nothing while the test is green. A promise of seconds is asserted when the question is asked, never when the
answer comes: a question asked later than promised must be answered with yes, however long that takes. What must not be
early has a lower bound. bench/ shows how long things really take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.05


def wait_until(
    is_true: Callable[[], bool], *, what: str = "the condition", patience_seconds: float = PATIENCE_SECONDS
) -> None:
    """Look again and again until it is true, for as long as only a broken service takes."""
    deadline = time.monotonic() + patience_seconds
    while not is_true():
        assert time.monotonic() < deadline, f"{what} did not come true in {patience_seconds:.0f} s"
        time.sleep(_POLL_SECONDS)


def repeat_until(is_true: Callable[[], bool], act: Callable[[], object]) -> None:
    """Do something again and again, at a slow pace, until it is true."""

    def has_come() -> bool:
        if is_true():
            return True
        act()
        return False

    wait_until(has_come)


def ask_until(is_true: Callable[[], bool], *, promised_seconds: float) -> None:
    """Ask until the answer is yes; a question that is put later than promised may not be answered by no.

    For promises that the asked keeps by its own clock, such as "no key is believed for longer than this".
    """
    begun = asked_at = time.monotonic()
    while not is_true():
        assert asked_at - begun < promised_seconds, f"still untrue for who asked {asked_at - begun:.2f} s later"
        time.sleep(_POLL_SECONDS)
        asked_at = time.monotonic()


@contextmanager
def takes_at_least(seconds: float) -> Iterator[None]:
    """Fail when the block ends early. There is no upper bound: see above."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun >= seconds
