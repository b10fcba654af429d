"""Tests without a server: rules, values, pages, and the engine on tiny models."""
