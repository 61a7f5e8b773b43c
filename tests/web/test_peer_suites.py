"""Flask's, Flask-Login's and Starlette's own tests of sessions, against ours. What can't pass is named, and why.

Not run, because neither their source distributions nor their wheels have tests: Flask-Session (its tests are of
stores: Redis, memcached, MongoDB …) and starsessions (tests of its own classes and stores, written under ids of the
test's own). Django's are in test_django_suite.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stillroom import Settings
from stillroom.embedded import EmbeddedServer
from tests.support.web import environment_of

ROOT = Path(__file__).parent.parent.parent


class Suite(NamedTuple):
    """A suite: its project, its files, how many tests it has at least, and which cannot pass."""

    package: str
    kind: str
    tests: tuple[str, ...]
    least: int
    cant_pass: dict[str, str]


NO_REFRESH = "the cookie is not sent again for being seen: it is kept up to the session's end"
NO_SECRET = (
    "sessions are signed by nobody: they are in Redis, so there is no secret key to lack or change"
)
SMALL = "looks for an attribute of the cookie in small letters"
FLASK = Suite(
    "flask",
    "flask",
    (
        "test_basic.py",
        "test_reqctx.py",
        "test_session_interface.py",
        "test_testing.py",
        "test_templating.py",
        "test_signals.py",
        "test_blueprints.py",
        "test_helpers.py",
        "test_user_error_handler.py",
    ),
    300,
    {
        "test_session_using_session_settings": "wants the cookie to be called `session`, which is set by nobody",
        "test_session_using_samesite_attribute": "wants no SameSite where none is set: it is Lax",
        "test_missing_session": NO_SECRET,
        "test_session_secret_key_fallbacks": NO_SECRET,
        "test_session_transactions_no_null_sessions": NO_SECRET,
        "test_session_expiration": "wants Expires, where the cookie has Max-Age",
        "test_session_cookie_setting": NO_REFRESH,
        "test_session_refresh_vary": NO_REFRESH,
        "test_bad_environ_raises_bad_request": "fails with Flask's own sessions, too, and this werkzeug",
    },
)
FLASK_LOGIN = Suite("flask-login", "flask", ("test_login.py",), 100, {})
STARLETTE = Suite(
    "starlette",
    "starlette",
    ("middleware/test_session.py",),
    12,
    {
        "test_partitioned_session[asyncio-True]": SMALL,
        "test_session_cookie_subpath[asyncio]": SMALL,
        "test_domain_cookie[asyncio]": f"{SMALL}, and for a dot in front of the domain",
        "test_session_zero_max_age[asyncio]": "wants a cookie that is over before it began",
    },
)


def source_of(package: str, folder: Path) -> Path:
    """Return the source distribution of the installed version, or skip the test where it is missing."""
    wanted = f"{package}=={version(package)}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", package, wanted]
    if not (found := list(folder.glob("*.tar.gz"))):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        found = list(folder.glob("*.tar.gz"))
        if not found:
            pytest.skip(f"{wanted} can't be had as a source here: {done.stderr.strip()[-200:]}")
    with tarfile.open(found[0]) as packed:
        packed.extractall(folder, filter="data")
    (source,) = [one for one in folder.iterdir() if (one / "tests").is_dir()]
    return source


@pytest.mark.long
@pytest.mark.parametrize("suite", [FLASK, FLASK_LOGIN, STARLETTE], ids=lambda suite: suite.package)
def test_their_own_tests_pass_but_for_those_named(
    suite: Suite, request: pytest.FixtureRequest
) -> None:
    """The peers' own tests pass with our sessions in place of theirs, except the named ones."""
    cache: Any = request.config.cache
    source = source_of(
        suite.package, Path(cache.mkdir(f"{suite.package}-{version(suite.package)}"))
    )
    with EmbeddedServer() as server:
        told = environment_of(Settings(redis_url=server.url, session_peppers="p" * 40))
        plugins = [str(ROOT / "tests/support"), str(ROOT / "shared"), *filter(None, sys.path)]
        told |= {"SUITE": suite.kind, "PYTHONPATH": os.pathsep.join(plugins)}
        options = [
            "-q",
            "-rfE",
            "--tb=short",
            "-p",
            "peer_suites",
            "-p",
            "no:cacheprovider",
        ]
        options += ["-W", "ignore", "-o", "addopts=", "-o", "xfail_strict=false"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in suite.tests)],
            cwd=source,
            env={**os.environ, **told},
            capture_output=True,
            text=True,
            check=False,
        )
    lost = set(re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.MULTILINE))
    ran = sum(map(int, re.findall(r"(\d+) (?:passed|failed)", done.stdout.splitlines()[-1])))
    assert ran >= suite.least, done.stdout[-2_000:] + done.stderr[-2_000:]
    assert lost == suite.cant_pass.keys(), done.stdout[-6_000:]
