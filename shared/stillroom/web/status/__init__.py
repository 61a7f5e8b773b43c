"""The page at /status: how everything is, what to do, and the last 15 minutes to 7 days. Plain HTML: no script.

`render` is a pure function of what others have read; whoever serves the page sends HEADERS along, and guards it.
"""

from stillroom.web.status.choices import view_of
from stillroom.web.status.document import HEADERS
from stillroom.web.status.page import render

__all__ = ["HEADERS", "render", "view_of"]
