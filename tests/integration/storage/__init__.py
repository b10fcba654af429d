"""Tests of core.storage against a real S3 server."""
