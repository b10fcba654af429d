"""What a process reports about itself: logs, metrics, liveness, readiness and traces. This package reads no rows."""
