"""The command line: the launcher of the local stack, operator commands, and the demo."""
