"""What every process shares: values, settings, rows, objects. Never loads torch, and never speaks HTTP."""
