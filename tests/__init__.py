"""The tests. tests/README.md says where what belongs and how to run it."""
