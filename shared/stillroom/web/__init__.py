"""In the request path: sessions and limits for WSGI and ASGI apps, what Flask and Django plug in, and health.

Nothing here is imported by the rest. Take what your app speaks: `stillroom.web.wsgi`, `.asgi`, `.flask`, `.django`;
`HealthWSGI` and `HealthASGI` are small apps, to mount or to wrap another.
"""

from stillroom.web.asgi_health import HealthASGI
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.wsgi_health import HealthWSGI

__all__ = ["HealthASGI", "HealthWSGI", "SessionCookie"]
