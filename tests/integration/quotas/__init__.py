"""Tests of tenants' quotas."""
