"""Django's own tests of caches and sessions, run against our backend and our engine.

    python -m tests.support.django_suite <Django's folder of tests> <Redis URL>

In a process of its own: it configures Django. Prints one line of JSON: how many tests ran, and the names of those
that did not pass. Django is licensed BSD-3-Clause; its tests are run from its source distribution and are not
copied here.
"""

from __future__ import annotations

import importlib
import json
import sys
import unittest
from typing import Any

import django
from django.conf import settings
from django.test.runner import DiscoverRunner

BACKEND = "stillroom.web.django.cache.StillroomCache"
CACHES: dict[str, dict[str, Any]] = {
    "default": {},
    "prefix": {"KEY_PREFIX": "cacheprefix"},
    "v2": {"VERSION": 2},
    "custom_key": {"KEY_FUNCTION": "cache.tests.custom_key_func"},
    "custom_key2": {"KEY_FUNCTION": "cache.tests.custom_key_func"},
}


def configure(url: str) -> None:
    settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        INSTALLED_APPS=["django.contrib.sessions", "cache", "sessions_tests"],
        CACHES={name: {"BACKEND": BACKEND, **options} for name, options in CACHES.items()},
        SESSION_ENGINE="stillroom.web.django.sessions",
        MIDDLEWARE=[],
        SECRET_KEY="of no use outside this process",
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        USE_TZ=True,
        STILLROOM={
            "redis_url": url,
            "session_peppers": "a-pepper-for-tests-long-enough-to-be-one",
            "command_timeout": 10,
            "call_timeout": 30,
        },
    )
    django.setup()


def suite() -> unittest.TestSuite:
    """Return the test classes that each cache backend and session engine of Django has to pass."""
    from django.test import SimpleTestCase, TestCase

    from stillroom.web.django.sessions import SessionStore

    caches: Any = importlib.import_module("cache.tests")
    sessions: Any = importlib.import_module("sessions_tests.tests")
    cache_tests = type("StillroomCacheTests", (caches.BaseCacheTests, TestCase), {})
    session_tests = type(
        "StillroomSessionTests",
        (sessions.SessionTestsMixin, SimpleTestCase),
        {"backend": SessionStore},
    )
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    kinds = (cache_tests, session_tests, sessions.SessionMiddlewareTests)
    return unittest.TestSuite(load(kind) for kind in kinds)


class Names(unittest.TextTestResult):
    """Collects the tests that did not pass, with the reason."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lost: dict[str, str] = {}

    def addError(self, test: Any, err: Any) -> None:  # noqa: N802
        self._lose(test, err)

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        self._lose(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        if err is not None:
            self._lose(test, err)

    def _lose(self, test: Any, err: Any) -> None:
        kind = type(test).__name__
        name = f"{kind}.{test._testMethodName}"
        self.lost.setdefault(name, f"{err[0].__name__}: {err[1]}"[:300])


def main(folder: str, url: str) -> None:
    sys.path.insert(0, folder)
    configure(url)
    runner = DiscoverRunner(verbosity=0, interactive=False)
    runner.setup_test_environment()
    databases = runner.setup_databases()
    try:
        result = unittest.TextTestRunner(verbosity=0, resultclass=Names).run(suite())
    finally:
        runner.teardown_databases(databases)
        runner.teardown_test_environment()
    assert isinstance(result, Names)
    print(json.dumps({"ran": result.testsRun, "lost": result.lost}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
