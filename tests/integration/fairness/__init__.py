"""Tests of fair sharing over time: slots, pools, newcomers and charges."""
