"""Tests of the object store, against a real S3 server."""
