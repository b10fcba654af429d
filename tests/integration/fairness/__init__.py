"""Tests of fair share: charges, turns of pools, slots that are lent."""
