"""The names of all settings: those of the processes and those that options of the command line are read from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer.main

import core.settings
from cli.main import app
from core.settings import FILE_SUFFIX, variable_of


def settings() -> set[str]:
    classes = [each for _, each in inspect.getmembers(core.settings, inspect.isclass) if hasattr(each, "model_fields")]
    return {variable_of(name) for each in classes for name in each.model_fields}


def options(command: Any) -> Iterator[str]:
    """Yield the variables that options of the command line are read from."""
    for child in getattr(command, "commands", {}).values():
        yield from options(child)
    for each in command.params:
        if each.envvar:
            yield each.envvar


KNOWN = settings() | set(options(typer.main.get_command(app)))
KNOWN_TOO = {name + FILE_SUFFIX for name in KNOWN}
