"""Tests of quotas against simultaneous requests."""
