"""Tests of `espalier up` and of the processes that it starts."""
