"""Tests of what every command prints."""
