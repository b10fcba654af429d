"""The command line: the launcher's commands, what an operator does by hand, and the demo."""
