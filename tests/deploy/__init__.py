"""What is deployed, executed: images and compose in a container engine of the check's own."""
