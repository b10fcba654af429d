"""Fair share between tenants: decayed usage over weight decides who is next, and how long slots and bases are kept.

A tenant's usage is in GPU-seconds, which halve every `USAGE_HALF_LIFE_SECONDS`. Its score is usage over weight. The
tenant with the lowest score is next, for a free slot and for a lent one.

- A claim is charged at once with an estimate of the work to come, so that the claims of a burst do not all see the same
  low usage. The charge is at most what a slot can use before the next decision. After that, use is charged as it is
  measured. What was charged and not used is returned when the attempt ends.
- A slot is lent after a quantum, if a tenant with a lower score waits. Lending costs no charge and no attempt.
- A worker keeps its base for a turn while jobs for another base wait, or longer where loading is slow.
"""

from __future__ import annotations

from dataclasses import dataclass

USAGE_HALF_LIFE_SECONDS = 24 * 3600.0
# How long a job trains in its slot before the slot may be lent.
QUANTUM_SECONDS = 600.0
# How long a worker keeps its base although the job of another pool comes first.
TURN_SECONDS = 900.0
# The part of a worker's time that loading may take when tenants alternate between bases.
MAX_LOADING_FRACTION = 0.05
# The charge for a claim where nothing was measured yet.
ENTRY_CHARGE_SECONDS = 60.0
_USUAL_SLOTS = 8
# The device time that one slot of a full worker uses in a quantum.
SLOT_SECONDS = QUANTUM_SECONDS / _USUAL_SLOTS


@dataclass(frozen=True)
class FairnessTerms:
    """How long a job keeps its slot and a worker its base, while others wait.

    A turn is longer if loading a base would otherwise take more than `max_loading_fraction` of a worker's time.
    """

    quantum_seconds: float = QUANTUM_SECONDS
    turn_seconds: float = TURN_SECONDS
    max_loading_fraction: float = MAX_LOADING_FRACTION

    def turn_length(self, load_seconds: float) -> float:
        """Return how long a worker keeps its base, from the time that loading it took."""
        return max(self.turn_seconds, load_seconds / self.max_loading_fraction)


def decay_usage(usage_seconds: float, elapsed_seconds: float) -> float:
    """Return what is left of this many GPU-seconds after `elapsed_seconds`."""
    return float(usage_seconds * 0.5 ** (elapsed_seconds / USAGE_HALF_LIFE_SECONDS))


def slot_seconds(quantum_seconds: float, *, slots: int = _USUAL_SLOTS) -> float:
    """Return the GPU-seconds that one slot of a full worker uses in a quantum."""
    return quantum_seconds / slots
