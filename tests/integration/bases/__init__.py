"""Tests of which base a worker holds, loads and refuses."""
