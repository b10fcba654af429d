"""The command line: the launcher's commands, operators' tasks, and the demo."""
