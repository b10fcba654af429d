"""Tests of the API over HTTP, against the same servers."""
