"""Deployments, executed: images and compose in a container engine that belongs to the check."""
