"""Fair share between tenants: decayed usage over weight decides who is next, and how long a slot and a base are kept.

A tenant's usage is GPU-seconds that halve every `USAGE_HALF_LIFE_SECONDS`. Its score is usage over weight. The tenant
with the lowest score is next, for a free slot as for one that is lent.

- A claim is charged at once for what is known of the work to come, so that a burst of claims does not all see the same
  low usage. The charge is bounded by what a slot may use before the next decision. From then on use is charged as it is
  measured, and what was charged and not used is returned when the attempt ends.
- A slot is lent after a quantum, when a tenant with a lower score waits. Nothing is charged for that, and no attempt
  is counted.
- A worker keeps its base for a turn while others wait for another base, or longer where loading is slow.
"""

from __future__ import annotations

from dataclasses import dataclass

USAGE_HALF_LIFE_SECONDS = 24 * 3600.0
# So long a job steps in its slot before the slot may be lent.
QUANTUM_SECONDS = 600.0
# So long a worker keeps the base it has loaded although another pool's job comes first.
TURN_SECONDS = 900.0
# Loading bases may take this part of a worker's time where tenants alternate between bases.
MAX_LOADING_FRACTION = 0.05
# What a claim is charged where nothing was measured yet.
ENTRY_CHARGE_SECONDS = 60.0
_USUAL_SLOTS = 8
# What one slot of a full worker uses of the device in a quantum.
SLOT_SECONDS = QUANTUM_SECONDS / _USUAL_SLOTS


@dataclass(frozen=True)
class FairnessTerms:
    """How long a slot is a job's own, and how long a worker keeps its base, while others wait.

    A turn is longer where loading a base would otherwise take more than `max_loading_fraction` of a worker's time.
    """

    quantum_seconds: float = QUANTUM_SECONDS
    turn_seconds: float = TURN_SECONDS
    max_loading_fraction: float = MAX_LOADING_FRACTION

    def turn_length(self, load_seconds: float) -> float:
        """Return how long a worker keeps its base, given what loading it took."""
        return max(self.turn_seconds, load_seconds / self.max_loading_fraction)


def decay_usage(usage_seconds: float, elapsed_seconds: float) -> float:
    """Return what is left of so many GPU-seconds after `elapsed_seconds`."""
    return float(usage_seconds * 0.5 ** (elapsed_seconds / USAGE_HALF_LIFE_SECONDS))


def slot_seconds(quantum_seconds: float, *, slots: int = _USUAL_SLOTS) -> float:
    """Return the GPU-seconds that one slot of a full worker uses in a quantum."""
    return quantum_seconds / slots
