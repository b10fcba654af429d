"""Checks of what is deployed: alerts, dashboards, images. Each is a program, run by a target of the Makefile."""
