"""Fair share between tenants: decayed usage over weight, charged on entry.

A tenant's usage is GPU-seconds that halve every `USAGE_HALF_LIFE_SECONDS`; the next job comes from the tenant with the
least usage per weight. A claim is charged at once with an estimate, so that a burst of claims does not all see the
same low usage, and corrected when the attempt ends.
"""

from __future__ import annotations

USAGE_HALF_LIFE_SECONDS = 6 * 3600.0
ENTRY_CHARGE_SECONDS = 60.0


def decay_usage(usage: float, elapsed_seconds: float) -> float:
    """Return what is left of `usage` GPU-seconds after `elapsed_seconds`."""
    return float(usage * 0.5 ** (elapsed_seconds / USAGE_HALF_LIFE_SECONDS))
