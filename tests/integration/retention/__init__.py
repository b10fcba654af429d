"""Tests of the deletion of old rows."""
