"""Measures what calls cost, beside redis-py and others, by `python -m bench`. README.md here explains how."""
