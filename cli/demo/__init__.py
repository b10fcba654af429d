"""The demo: two teams teach one base model their own documentation, through the whole service."""
