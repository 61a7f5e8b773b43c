"""docs/howto/celery.md works: real workers with each framework's loaders, beside the project's own Celery."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom import Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support.celery_process import until
from tests.support.entries import age
from tests.support.guide import write_files
from tests.support.processes import run_to_end

PAGE = "howto/celery.md"
BIN = Path(sys.executable).parent
START_S = 150.0
PATIENT: Any = {"connect_timeout": 5, "command_timeout": 5, "call_timeout": 10}  # seconds

DJANGO_SETTINGS = """
SECRET_KEY = "x" * 50
INSTALLED_APPS = ["catalog", "stillroom.web.django"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "books.db"}}
CELERY_BROKER_URL = %r
CELERY_TASK_IGNORE_RESULT = True
"""
MODELS = """
from django.db import models

class Book(models.Model):
    title = models.CharField(max_length=100)

    class Meta:
        db_table = "book"
"""
TASKS = """
import os
import redis
from celery import shared_task

@shared_task
def tell_editors(id):
    redis.Redis.from_url(os.environ["REDIS_URL"]).rpush("editors", f"{id} by {os.environ['WHO']}")
"""


class Project:
    """An app in a folder, and the programs that run for it."""

    def __init__(self, folder: Path, server: EmbeddedServer, started: ExitStack) -> None:
        self.folder, self._server, self._started = folder, server, started
        write_files(PAGE, folder)
        with closing(sqlite3.connect(folder / "books.db")) as db, db:
            db.execute("create table book (id integer primary key, title varchar)")
        self.retitle("one")

    def retitle(self, title: str) -> None:
        with closing(sqlite3.connect(self.folder / "books.db")) as db, db:
            db.execute("insert or replace into book values (7, ?)", [title])

    def start(self, *command: str, **environment: str) -> Path:
        """Start a program of this environment as a person types it; return its log."""
        log = self.folder / f"{command[0]}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=self.folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment(**environment),
            )
        self._started.callback(_end, process)
        until(lambda: " ready." in log.read_text() or process.poll() is not None, "ready", START_S)
        assert process.poll() is None, log.read_text()
        return log

    def environment(self, **more: str) -> dict[str, str]:
        paths = os.pathsep.join([str(self.folder), *filter(None, sys.path)])
        return os.environ | {"REDIS_URL": self._server.url, "PYTHONPATH": paths, **more}

    def run(self, source: str, **environment: str) -> str:
        """Run a small program in the folder; return what it prints."""
        done = run_to_end(
            [sys.executable, "-c", source],
            cwd=self.folder,
            env=self.environment(**environment),
            timeout=90,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.fixture
def project(own_server: EmbeddedServer, tmp_path: Path) -> Iterator[Project]:
    with redis.Redis.from_url(own_server.url) as db, ExitStack() as started:
        db.flushall()
        yield Project(tmp_path, own_server, started)


def refreshed(server: EmbeddedServer, template: str, name: str, old: Any) -> Any:
    """Return the value that a worker stored in place of a stale one."""
    key = template.replace("{id}", "7")
    with (
        redis.Redis.from_url(server.url) as db,
        Stillroom(Settings(redis_url=server.url, **PATIENT)) as room,
    ):

        @room.cache.cached(template, ttl=60, swr=3_600, name=name)
        def load(id: int) -> str:
            return str(old)

        load(7)
        age(db, b"stillroom:{0}:e:" + key.encode(), 61)
        assert load(7) == old
        return until(lambda: load(7) != old and load(7), "the worker's value", 60)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_django_beside_its_own_celery(project: Project, own_server: EmbeddedServer) -> None:
    """Django loaders have their models, and a shared task goes to the project's own worker; both end
    by themselves.
    """
    (project.folder / "bookshop/settings.py").write_text(DJANGO_SETTINGS % own_server.url)
    catalog = project.folder / "catalog"
    catalog.mkdir()
    (catalog / "__init__.py").touch()
    (catalog / "models.py").write_text(MODELS)
    (catalog / "tasks.py").write_text(TASKS)
    django = {"DJANGO_SETTINGS_MODULE": "bookshop.settings"}
    ours = project.start(
        "stillroom", "worker", STILLROOM_LOADERS="bookshop.caching", WHO="stillroom", **django
    )
    theirs = project.start(
        *("celery", "-A", "bookshop", "worker", "-P", "solo", "-l", "INFO"),
        WHO="bookshop",
        **django,
    )
    name = project.run(
        "import django; django.setup(); from stillroom.web.django import room; "
        "import bookshop.caching; print(*room().cache.loaders.names())",
        **django,
    )
    assert refreshed(own_server, "book:{id}", name, "zero") == "one"
    with redis.Redis.from_url(own_server.url) as db:
        until(lambda: db.llen("editors"), "the project's task", 60)
        assert db.lrange("editors", 0, -1) == [b"7 by bookshop"]
    assert "tell_editors" not in ours.read_text()
    assert "stillroom.refresh" not in theirs.read_text()


@pytest.mark.timeout(300)
def test_flask_with_an_app_factory(project: Project, own_server: EmbeddedServer) -> None:
    """Each load of a Flask app factory has the app's context and a database session of its own."""
    pytest.importorskip("flask_sqlalchemy")
    project.start(
        *("stillroom", "worker"),
        STILLROOM_LOADERS="flaskworker",
        FLASK_SQLALCHEMY_DATABASE_URI=f"sqlite:///{project.folder}/books.db",
    )
    assert refreshed(own_server, "book:{id}", "load_book", "zero") == "one"
    project.retitle("two")
    with redis.Redis.from_url(own_server.url) as db:
        db.delete("stillroom:{0}:e:book:7")
    assert refreshed(own_server, "book:{id}", "load_book", "zero") == "two"


@pytest.mark.timeout(300)
def test_fastapi_with_what_its_lifespan_opens(project: Project, own_server: EmbeddedServer) -> None:
    """A load in a worker, which has no server, has the pool that FastAPI's lifespan opens."""
    project.start("stillroom", "worker", STILLROOM_LOADERS="fastbooks")
    assert refreshed(own_server, "book:{id}", "load_book", "zero") == "one"


@pytest.mark.timeout(300)
def test_a_context_around_each_load(project: Project, own_server: EmbeddedServer) -> None:
    """The context that `around_load` makes is entered in the worker as in the app."""
    assert project.run("import around; print(around.load_who(1))") == "the loader"
    project.start("stillroom", "worker", STILLROOM_LOADERS="around")
    assert refreshed(own_server, "who:{id}", "load_who", "nobody") == "the loader"
