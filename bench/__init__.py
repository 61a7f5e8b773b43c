"""What calls cost, beside redis-py and others. `python -m bench` measures it; README.md here explains how."""
