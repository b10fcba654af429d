"""Tests that deleted data is gone."""
