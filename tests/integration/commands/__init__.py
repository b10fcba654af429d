"""Tests of the output and the errors of every `espalier` command."""
