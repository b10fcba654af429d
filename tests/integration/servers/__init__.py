"""Tests of the embedded servers of the local stack."""
