"""The commands by which an operator checks a deployment, run in the container that is made for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any


def examine(execute: Callable[..., str], *, unseen: Sequence[str], options: Sequence[str] = ()) -> None:
    """Run `espalier doctor` and `espalier check-contract --deep` by `execute`, while a worker serves.

    Nothing may have failed, and but for the checks `unseen` nothing may be skipped: the container reaches all of it.
    """
    found = _read(execute("espalier", "doctor", "--json", *options))
    states = {each["check"]: each["state"] for each in found}
    assert "failed" not in states.values(), found
    assert {check for check, state in states.items() if state == "skipped"} == set(unseen), found
    (workers,) = (each["says"] for each in found if each["check"] == "workers")
    assert "alive" in workers, workers
    assert "No worker" not in workers, workers
    promises = _read(execute("espalier", "check-contract", "--deep", "--json"))
    assert not [each for each in promises if each["num_broken"]], promises
    num_checked = sum(each["num_checked"] for each in promises)
    warned = [each["check"] for each in found if each["state"] == "warning"]
    print(
        f"espalier doctor: {len(found)} checks, none failed, warned of {warned or 'nothing'}, not seen {list(unseen)}; "
        f"check-contract --deep: {len(promises)} promises kept, {num_checked} things looked at",
        flush=True,
    )


def _read(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]
