"""Which program wrote a server's data: a note in their directory, so that one that cannot read them is never tried.

A server that finds data of another kind, or of a newer version, dies as it starts, again and again. The launcher says
beforehand what is wrong and which setting mends it.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from local.private_files import write_private
from local.processes import ProcessFailedError

_NOTE = "written_by"
# Valkey was made of Redis 7.2 and reads what Redis wrote until then; since then the two read nothing of each other's.
_LAST_COMMON = (7, 2)
_HEADER_BYTES = 100


@dataclass(frozen=True)
class Program:
    """A server program: its kind and version, as "Valkey 9.1.2"."""

    kind: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.version}"

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")))

    def can_read(self, writer: Program) -> bool:
        """Return whether this program reads what another wrote: one of its kind, and no newer major version."""
        if self.kind == writer.kind:
            return self.numbers[0] >= writer.numbers[0]
        return (self.kind, writer.kind) == ("Valkey", "Redis") and writer.numbers[:2] <= _LAST_COMMON


def ask_program(argv: list[str], pattern: str, *, kind: str | None = None) -> Program:
    """Return what a program says that it is, by a pattern with the groups `version` and, unless told, `kind`."""
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    found = re.search(pattern, said)
    if found is None:
        raise ProcessFailedError(f"{' '.join(argv)} does not say its version: {said.strip()[:200]!r}")
    return Program(kind or found["kind"], found["version"])


def claim_data(directory: Path, program: Program, *, remedy: str) -> None:
    """Note which program writes in a directory from now on.

    Raises ProcessFailedError when it cannot read what is there. Where an older launcher made no note, the files
    themselves are asked.
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
    """Return who began the append-only file of a Redis or Valkey: its base, a dump, opens with that."""
    for base in sorted(directory.glob("appendonlydir/*.base.rdb")):
        with base.open("rb") as dump:
            found = re.search(rb"(redis|valkey)-ver.([0-9]+(?:\.[0-9]+)*)", dump.read(_HEADER_BYTES), re.DOTALL)
        if found is not None:
            return Program(found[1].decode().capitalize(), found[2].decode())
    return None
