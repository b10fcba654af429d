"""Tests of the trainer's loop, with a supervisor and an object store that the tests play."""
