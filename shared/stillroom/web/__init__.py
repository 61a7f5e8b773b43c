"""In the request path: sessions and limits for WSGI and ASGI apps, and what Flask and Django plug in.

Nothing here is imported by the rest. Take what your app speaks: `stillroom.web.wsgi`, `.asgi`, `.flask`, `.django`.
"""

from stillroom.web.request_session import AsyncWebSession, WebSession
from stillroom.web.session_cookie import SessionCookie

__all__ = ["AsyncWebSession", "SessionCookie", "WebSession"]
