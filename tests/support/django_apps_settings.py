"""Settings for Django's own runtests.py: its apps' tests with our session engine, and our session middleware.

    python runtests.py --settings=django_apps_settings auth_tests …     # the room's settings from the environment

It imports nothing of these tests: Django's are a package of the same name.
"""

from __future__ import annotations

from typing import Any

from django.apps import apps

DATABASES = {name: {"ENGINE": "django.db.backends.sqlite3"} for name in ("default", "other")}
SECRET_KEY = "of no use outside this process"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
SESSION_ENGINE = "stillroom.web.django.sessions"

_populate = apps.populate


def populate(*given: Any, **named: Any) -> None:
    """Replace Django's session middleware by ours once the apps are there."""
    _populate(*given, **named)
    import django.contrib.sessions.middleware as theirs

    from stillroom.web.django.middleware import SessionMiddleware

    theirs.SessionMiddleware = SessionMiddleware


apps.populate = populate
