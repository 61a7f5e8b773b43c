"""Stillroom in a web app: small WSGI and ASGI apps, to mount or to wrap another."""

from stillroom.web.asgi_health import HealthASGI
from stillroom.web.wsgi_health import HealthWSGI

__all__ = ["HealthASGI", "HealthWSGI"]
