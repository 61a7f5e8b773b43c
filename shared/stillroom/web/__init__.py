"""Stillroom in a web app: sessions and limits in the request path, health to mount, and what frameworks plug in.

Take what your app speaks: `stillroom.web.wsgi`, `.asgi`, `.flask`, `.fastapi`, `.starlette`, `.django`.
"""

from stillroom.web.asgi_health import HealthASGI
from stillroom.web.limited import Answered, Header
from stillroom.web.refusal import Refusal
from stillroom.web.request_session import AsyncWebSession, WebSession
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.wsgi_health import HealthWSGI

__all__ = [
    "Answered",
    "AsyncWebSession",
    "Header",
    "HealthASGI",
    "HealthWSGI",
    "Refusal",
    "SessionCookie",
    "WebSession",
]
