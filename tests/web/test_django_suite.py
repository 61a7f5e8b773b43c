"""Django's own tests of cache backends and sessions pass with ours, except the named ones, each with a reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import django
import pytest

from stillroom import Settings
from stillroom.embedded import EmbeddedServer
from tests.support.web import environment_of

ROOT = Path(__file__).parent.parent.parent

NO_PICKLE = (
    "the cache keeps JSON and never pickles: whoever can write to Redis could run code in every app"
)
CANT_PASS = {
    "StillroomCacheTests.test_data_types": f"a function and a class; {NO_PICKLE}",
    "StillroomCacheTests.test_cache_read_for_model_instance": NO_PICKLE,
    "StillroomCacheTests.test_cache_read_for_model_instance_with_deferred": NO_PICKLE,
    "StillroomCacheTests.test_cache_write_for_model_instance_with_deferred": NO_PICKLE,
    "StillroomCacheTests.test_add_fail_on_pickleerror": "it raises, as it should, but no PickleError",
    "StillroomCacheTests.test_set_fail_on_pickleerror": "it raises, as it should, but no PickleError",
    "SessionMiddlewareTests.test_empty_session_saved": "looks into the table of Django's own engine",
}


# Those whose views, middleware and clients keep things in a session, in full and in short, and how many tests they
# have at least.
APPS = {
    True: (
        "auth_tests",
        "messages_tests",
        "csrf_tests",
        "test_client",
        "test_client_regress",
        "sessions_tests",
        "async",
    ),
    False: ("auth_tests.test_views", "messages_tests", "test_client", "sessions_tests"),
}
LEAST = {True: 892, False: 300}
CANT_PASS_WITH_OUR_MIDDLEWARE = {
    "test_empty_session_saved": "looks into the table of Django's own engine",
    "test_save_every_request_with_non_empty_session_renews_session_cookie": (
        "a cookie goes out only where the browser has to keep another one"
    ),
}
# In full, since Django 6.
COUNTS_QUERIES = "test_protected_view_logged_in_performance"  # one of them is the session's


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest) -> Path:
    """Return the tests of Django's source distribution in the installed version; wheels have none."""
    assert request.config.cache is not None
    folder = Path(request.config.cache.mkdir(f"django-{django.__version__}"))
    tests = folder / f"django-{django.__version__}" / "tests"
    if not (tests / "runtests.py").exists():
        fetch(folder)
    return tests


def fetch(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", "django", f"django=={django.__version__}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"Django's source can't be had here: {done.stderr.strip()[-200:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, [m for m in packed if "/tests/" in m.name], filter="data")


@pytest.mark.long
def test_djangos_own_tests_pass_but_for_those_named(suite: Path) -> None:
    """Django's tests of all cache backends, session engines and the session middleware pass, except
    the named ones.
    """
    with EmbeddedServer() as server:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.django_suite", str(suite), server.url],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ran"] >= 120
    assert report["lost"].keys() == CANT_PASS.keys(), report["lost"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_djangos_apps_work_with_our_sessions(suite: Path, is_full: bool) -> None:
    """Two thousand (in short some hundred) of Django's tests of logins, messages, CSRF and clients pass with our
    engine and middleware.
    """
    with EmbeddedServer() as server:
        told = environment_of(Settings(redis_url=server.url, session_peppers="p" * 40))
        support = [str(ROOT / "tests/support"), str(ROOT / "shared"), *filter(None, sys.path)]
        options = ["--settings=django_apps_settings", "--parallel=1", "--verbosity=0"]
        done = subprocess.run(
            [sys.executable, "runtests.py", *options, *APPS[is_full]],
            cwd=suite,
            env={**os.environ, **told, "PYTHONPATH": os.pathsep.join(support)},
            capture_output=True,
            text=True,
            check=False,
        )
    ran = re.search(r"^Ran (\d+) tests", done.stderr, re.MULTILINE)
    assert ran is not None, done.stderr[-4_000:]
    assert int(ran[1]) >= LEAST[is_full]
    lost = re.findall(r"^(?:ERROR|FAIL): (\w+)", done.stderr, re.MULTILINE)
    more = {COUNTS_QUERIES} if is_full and django.VERSION >= (6, 0) else set()
    assert set(lost) == CANT_PASS_WITH_OUR_MIDDLEWARE.keys() | more, done.stderr[-6_000:]
