"""What is wrong with a row, said before its line number is known."""

from __future__ import annotations

from typing import NoReturn

_MAX_SHOWN_CHARACTERS = 60


class RefusalError(Exception):
    """A row that is refused. `ends_reading` where the lines that follow would only be refused for the same reason."""

    def __init__(self, path: str, code: str, message: str, hint: str, *, ends_reading: bool = False) -> None:
        super().__init__(message)
        self.path, self.code, self.message, self.hint = path, code, message, hint
        self.ends_reading = ends_reading

    def within(self, parent: str) -> RefusalError:
        """Return the same seen from the parent: paths are built only when something is wrong."""
        path = f"{parent}.{self.path}" if self.path else parent
        return RefusalError(path, self.code, self.message, self.hint)


def refuse(path: str, code: str, message: str, hint: str) -> NoReturn:
    raise RefusalError(path, code, message, hint)


def show_value(value: object) -> str:
    """Show a tenant's value shortly, safe to store as text."""
    return ascii(value)[:_MAX_SHOWN_CHARACTERS]
