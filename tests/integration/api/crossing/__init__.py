"""Tests of the walls between tenants, over every route."""
