"""The example shop under load. `python -m bench.load`."""
