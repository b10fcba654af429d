"""Tests of `espalier doctor` on sound and on faulty deployments."""
