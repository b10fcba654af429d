"""Tests of the deletion of jobs and tenants."""
