"""Notes in a data directory which program wrote it, so that a program that cannot read the data is never started on it.

A server on data of another kind, or of a newer version, dies at every start. The launcher instead says what is wrong
and which setting fixes it.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from local.private_files import write_private
from local.processes import ProcessFailedError

_NOTE = "written_by"
# Valkey began as a copy of Redis 7.2 and reads the files of Redis up to then. Newer files of the two are incompatible.
_LAST_COMMON = (7, 2)
_HEADER_BYTES = 100


@dataclass(frozen=True)
class Program:
    """A server program: its kind and version, such as "Valkey 9.1.2"."""

    kind: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.version}"

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")))

    def can_read(self, writer: Program) -> bool:
        """Return whether this program reads what another wrote: the same kind, and no newer major version."""
        if self.kind == writer.kind:
            return self.numbers[0] >= writer.numbers[0]
        return (self.kind, writer.kind) == ("Valkey", "Redis") and writer.numbers[:2] <= _LAST_COMMON


def ask_program(argv: list[str], pattern: str, *, kind: str | None = None) -> Program:
    """Return a program's own kind and version, by a pattern with the groups `version` and, unless given, `kind`."""
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    found = re.search(pattern, said)
    if found is None:
        raise ProcessFailedError(f"{' '.join(argv)} does not say its version: {said.strip()[:200]!r}")
    return Program(kind or found["kind"], found["version"])


def claim_data(directory: Path, program: Program, *, remedy: str) -> None:
    """Note that this program writes in a directory from now on.

    Raises ProcessFailedError when it cannot read what is there. If an older launcher made no note, the files themselves
    are inspected.
    """
    writer = _read_note(directory) or _read_header(directory)
    if writer is not None and not program.can_read(writer):
        raise ProcessFailedError(f"The data in {directory} are of {writer}, which {program} cannot read. {remedy}")
    write_private(directory / _NOTE, f"{program}\n")


def _read_note(directory: Path) -> Program | None:
    try:
        kind, _, version = (directory / _NOTE).read_text(encoding="utf-8").strip().partition(" ")
    except FileNotFoundError:
        return None
    return Program(kind, version)


def _read_header(directory: Path) -> Program | None:
    """Return which program began an append-only file of Redis or Valkey. Its base, a dump, starts with the name."""
    for base in sorted(directory.glob("appendonlydir/*.base.rdb")):
        with base.open("rb") as dump:
            found = re.search(rb"(redis|valkey)-ver.([0-9]+(?:\.[0-9]+)*)", dump.read(_HEADER_BYTES), re.DOTALL)
        if found is not None:
            return Program(found[1].decode().capitalize(), found[2].decode())
    return None
