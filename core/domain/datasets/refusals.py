"""The reason why a row is refused, before its line number is known."""

from __future__ import annotations

from typing import NoReturn

_MAX_SHOWN_CHARACTERS = 60


class RefusalError(Exception):
    """A row is refused. `ends_reading` says that all later lines would be refused for the same reason."""

    def __init__(self, path: str, code: str, message: str, hint: str, *, ends_reading: bool = False) -> None:
        super().__init__(message)
        self.path, self.code, self.message, self.hint = path, code, message, hint
        self.ends_reading = ends_reading

    def within(self, parent: str) -> RefusalError:
        """Return the same error with a longer path. Only errors build paths, so good rows cost nothing."""
        path = f"{parent}.{self.path}" if self.path else parent
        return RefusalError(path, self.code, self.message, self.hint)


def refuse(path: str, code: str, message: str, hint: str) -> NoReturn:
    raise RefusalError(path, code, message, hint)


def show_value(value: object) -> str:
    """Show a tenant's value in short form that is safe to store as text."""
    return ascii(value)[:_MAX_SHOWN_CHARACTERS]
