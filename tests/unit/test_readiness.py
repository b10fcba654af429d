"""A probe for readiness is answered soon and correctly."""

from __future__ import annotations

import threading

import pytest

from core.domain.errors import DomainError, UnavailableError
from core.telemetry import readiness
from core.telemetry.readiness import Need, Readiness
from tests.waiting import wait_until


class Server:
    """Something that is asked: it answers, refuses, hangs or breaks in a way that nobody expected."""

    def __init__(self, *, is_there: bool = True) -> None:
        self.is_there, self.num_asked = is_there, 0
        self.goes_on = threading.Event()
        self.goes_on.set()

    def check(self) -> None:
        self.num_asked += 1
        self.goes_on.wait()
        if not self.is_there:
            raise UnavailableError("It is away.", code="away")


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(readiness, "_TTL_SECONDS", 0.0)


def codes(asked: Readiness) -> tuple[str | None, str | None]:
    verdict = asked.find_verdict()
    return code_of(verdict.obstacle), code_of(verdict.trouble)


def code_of(error: DomainError | None) -> str | None:
    return error.code if error is not None else None


def test_what_is_vital_keeps_a_process_from_being_ready_whenever_it_is_away() -> None:
    server = Server()
    asked = Readiness(Need("server", "away", server.check))
    wait_until(lambda: codes(asked) == (None, None))
    server.is_there = False
    wait_until(lambda: codes(asked) == ("away", "away"))


def test_what_is_not_vital_does_so_until_it_was_there_once() -> None:
    server = Server(is_there=False)
    asked = Readiness(Need("server", "away", server.check, is_vital=False))
    wait_until(lambda: codes(asked) == ("away", "away"))
    server.is_there = True
    wait_until(lambda: codes(asked) == (None, None))
    server.is_there = False
    wait_until(lambda: codes(asked) == (None, "away"))


def test_a_server_that_hangs_holds_one_thread_and_nobody_who_asks() -> None:
    server = Server()
    server.goes_on.clear()
    asked = Readiness(Need("server", "away", server.check))
    wait_until(lambda: codes(asked) == ("away", "away"))
    assert codes(asked) == ("away", "away")
    obstacle = asked.find_verdict().obstacle
    assert obstacle is not None
    assert obstacle.message.startswith("The server has not answered for ")
    assert server.num_asked == 1
    server.goes_on.set()
    wait_until(lambda: codes(asked) == (None, None))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_question_that_fails_in_a_way_of_its_own_is_no_answer() -> None:
    def check() -> None:
        raise ZeroDivisionError

    verdict = Readiness(Need("server", "away", check)).find_verdict()
    assert verdict.obstacle is not None
    assert (verdict.obstacle.code, verdict.obstacle.message) == ("away", "The server could not be asked.")
    wait_until(lambda: "server" not in {thread.name for thread in threading.enumerate()}, what="the thread's end")


def test_one_answer_is_for_all_who_ask_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_TTL_SECONDS", 3600.0)
    server = Server()
    asked = Readiness(Need("server", "away", server.check))
    for _ in range(10):
        assert codes(asked) == (None, None)
    assert server.num_asked == 1
