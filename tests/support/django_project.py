"""Django's settings, once for all tests of this process: whoever comes first configures them."""

from __future__ import annotations

import atexit
import shutil
import tempfile

import django
from django.conf import settings

from tests.support.web import COOKIE


def configure() -> None:
    if settings.configured:
        return
    folder = tempfile.mkdtemp(prefix="stillroom-django-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings.configure(
        ROOT_URLCONF="tests.web.test_django",
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="x" * 50,
        SESSION_ENGINE="stillroom.web.django.sessions",
        SESSION_COOKIE_NAME=COOKIE,
        SESSION_COOKIE_SECURE=True,
        MIDDLEWARE=["stillroom.web.django.middleware.SessionMiddleware"],
        CACHES={"default": {"BACKEND": "stillroom.web.django.cache.StillroomCache"}},
        INSTALLED_APPS=["stillroom.web.django", "tests.support.djangoshop"],
        TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": f"{folder}/shop.db",
                "OPTIONS": {"init_command": "PRAGMA journal_mode=WAL", "timeout": 10},
            }
        },
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        LOGGING_CONFIG=None,
        USE_TZ=True,
    )
    django.setup()
