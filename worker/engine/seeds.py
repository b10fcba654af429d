"""Seeds: all random draws of the engine depend on a job's seed and on names, never on a generator's state."""

from __future__ import annotations

import hashlib


def stable_hash(*parts: object) -> int:
    """Return 63 bits that depend on the parts alone, and are the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
