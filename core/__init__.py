"""What every process agrees on: values, settings, rows, objects. Never loads torch and never speaks HTTP."""
