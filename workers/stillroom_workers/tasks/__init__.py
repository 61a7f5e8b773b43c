"""The tasks. Each is a name for a method call on the room, and returns a small report."""
