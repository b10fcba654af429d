"""Tests that one tenant cannot reach another's things."""
