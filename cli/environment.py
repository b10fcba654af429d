"""How commands report missing or wrong settings: one line, without any value, and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cli.output import fail
from core.settings import SETTINGS_ERRORS, describe_faults

_CANNOT_SAY = 2


@contextmanager
def reading_settings() -> Iterator[None]:
    """Print the faults of the settings that are read inside the block, and end the command."""
    try:
        yield
    except SETTINGS_ERRORS as error:
        fail(f"These settings are missing or wrong: {describe_faults(error)}", exit_code=_CANNOT_SAY)
