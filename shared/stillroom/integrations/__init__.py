"""Stillroom in other libraries that an app has: its ORM. Import the module for the library you use."""
