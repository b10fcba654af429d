"""Tests of the whole service as processes, which are killed, frozen and cut off."""
