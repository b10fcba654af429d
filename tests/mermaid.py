"""Parses the part of Mermaid that the pages use, line by line, so that a broken picture is found without a browser.

The grammar is narrower than Mermaid's: Mermaid draws what passes here (11.17 has parsed every picture of the pages).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_TEXT = r"[^\"|<>]+"
_SHAPE = rf"(?:\[\"{_TEXT}\"\]|\[\(\"{_TEXT}\"\)\])?"
_NODE = rf"[a-z]\w*{_SHAPE}"
_ARROW = rf"(?:-->|-\.->)(?:\|\"{_TEXT}\"\|)?"
_SENTENCE = r"[^;#]+"  # a semicolon ends a message, and # begins an entity
_LINES = {
    "flowchart": (rf"{_NODE}( {_ARROW} {_NODE})*", rf"subgraph [a-z]\w*(\[\"{_TEXT}\"\])?", "end"),
    "stateDiagram-v2": (rf"(\[\*\]|\w+) --> (\[\*\]|\w+)(: {_SENTENCE})?",),
    "sequenceDiagram": (
        rf"participant \w+( as {_SENTENCE})?",
        rf"\w+(->>|-->>)\w+: {_SENTENCE}",
        rf"Note (over|left of|right of) \w+: {_SENTENCE}",
        rf"(loop|alt|opt) {_SENTENCE}",
        "end",
    ),
}
_OPENS: dict[str, str | tuple[str, ...]] = {
    "flowchart": "subgraph ",
    "sequenceDiagram": ("loop ", "alt ", "opt "),
    "stateDiagram-v2": (),
}
_DIRECTIONS = {"flowchart": r" (TB|LR|BT|RL)", "stateDiagram-v2": "", "sequenceDiagram": ""}


def blocks_of(page: str) -> list[str]:
    """Return the pictures of a Markdown page."""
    return [block.strip() for block in re.findall(r"^```mermaid\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)]


def find_faults(block: str) -> list[str]:
    """Say in one line each what Mermaid would not read."""
    first, *lines = block.splitlines()
    kind = first.split()[0]
    if kind not in _LINES or not re.fullmatch(kind + _DIRECTIONS[kind], first):
        return [f"no kind of picture that is known: {first!r}"]
    known = re.compile("|".join(f"(?:{each})" for each in _LINES[kind]))
    stripped = [line.strip() for line in lines]
    faults = [f"line {n}: {line!r}" for n, line in enumerate(stripped, 2) if line and not known.fullmatch(line)]
    if sum(line.startswith(_OPENS[kind]) for line in stripped) != stripped.count("end"):
        faults.append("subgraph or loop without its end")
    return faults + (list(_strangers(stripped)) if kind == "sequenceDiagram" else [])


def _strangers(lines: list[str]) -> Iterator[str]:
    """Yield who sends or gets a message and was not introduced, for a typing error would draw one more column."""
    introduced = {match[1] for line in lines if (match := re.match(r"participant (\w+)", line))}
    for number, line in enumerate(lines, 2):
        if match := re.match(r"(\w+)-?->>(\w+):", line):
            yield from (f"line {number}: {name} is no participant" for name in match.groups() if name not in introduced)
