"""Tests of the training loop with a real engine, without a database."""
