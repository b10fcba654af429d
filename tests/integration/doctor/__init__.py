"""Tests of `espalier doctor`."""
