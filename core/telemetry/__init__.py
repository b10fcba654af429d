"""What a process says of itself: logs, figures, signs of life, and traces. Nothing here knows a row."""
