"""Gives our worker a room with the page's loaders."""

from __future__ import annotations

from bench.page.ours import reads
from stillroom import Stillroom

room = Stillroom()
reads(room)
