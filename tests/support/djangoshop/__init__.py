"""A Django app with a few models."""
