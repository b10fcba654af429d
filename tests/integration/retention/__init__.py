"""Tests of what is deleted by its age."""
