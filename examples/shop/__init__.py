"""A small shop that uses all of Stillroom. Start reading at app.py."""
