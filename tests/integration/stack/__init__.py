"""Tests of `espalier up` and its companions."""
