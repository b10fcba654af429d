"""Tests of bases that are unusable, loaded or held."""
