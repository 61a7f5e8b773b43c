"""Django's own tests of cache backends and session engines, against ours. What can't pass is named, and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import django
import pytest

from stillroom.embedded import EmbeddedServer

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


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest) -> Path:
    """The tests from Django's source distribution, of the version that is installed; wheels have none."""
    assert request.config.cache is not None
    folder = Path(request.config.cache.mkdir(f"django-{django.__version__}"))
    tests = folder / f"django-{django.__version__}" / "tests"
    if not tests.exists():
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
        wanted = [
            m for m in packed if "/tests/cache/" in m.name or "/tests/sessions_tests/" in m.name
        ]
        packed.extractall(folder, wanted, filter="data")


@pytest.mark.long
def test_djangos_own_tests_pass_but_for_those_named(suite: Path) -> None:
    """Each of them: the mixin of all cache backends, the mixin of all session engines, the session middleware."""
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
