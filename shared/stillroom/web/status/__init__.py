"""The page at /status: how everything is, what to do, and the last 24 hours. Plain HTML: no script, no download.

`render` is a pure function of what others have read; whoever serves the page sends HEADERS along, and guards it.
"""

from stillroom.web.status.page import HEADERS, reload_seconds, render

__all__ = ["HEADERS", "reload_seconds", "render"]
