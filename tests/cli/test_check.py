"""`stillroom check`, and `stillroom doctor` on a system that has just started, say what is right and wrong."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings
from django.urls import include, path
from django.views.decorators.http import require_POST
from typer.testing import CliRunner

from stillroom import AUTH, Limit
from stillroom.cli import app
from stillroom.cli.application import apps_of
from stillroom.health import WorkerStats
from stillroom.web.django.limits import limited
from tests.support.crowd import PATIENT
from tests.support.processes import STILLROOM, run_to_end

GOOD = """
from stillroom import AUTH, Route, Routes, Stillroom
room = Stillroom()
@room.cache.cached("product:{number}", swr=600)
def product(number: int) -> int:
    return number
routes = Routes([Route("/login", [AUTH], methods=["POST"])])
"""
BAD = """
from flask import Flask
from stillroom import AUTH, Limit, Route, Routes, Stillroom
room = Stillroom()
@room.cache.cached("product:{number}", swr=1)
def product(number: int) -> int:
    return number
app = Flask(__name__)
app.add_url_rule("/login", "login", lambda: "")
api = [Limit("api", 5, 60)], [Limit("api", 6, 60)]
routes = Routes([Route("/login", [AUTH]), Route("/lgoin", api[0]), Route("/x", api[1]), Route("/x", api[0])])
"""
PAGES = """
from flask import Flask
from stillroom import Stillroom
from stillroom.web.pages import Pages
room = Stillroom()
app = Flask(__name__)
pages = Pages(room)
@app.get("/about")
@pages.page(ttl=60)
def about():
    return "about"
"""
DJANGO = """
from django.core.handlers.wsgi import WSGIHandler
from stillroom import Stillroom
room = Stillroom()
application = WSGIHandler()
"""
BROKEN = """
from stillroom import Stillroom
room = Stillroom()
@room.cache.cached("product:{number}", tags=["shop:{nmber}"])
def product(number: int) -> int:
    return number
"""
VIEWS = {
    "flask": """
from flask import Flask
from stillroom import AUTH, Limit, Stillroom
from stillroom.web.flask import StillroomLimits, fresh, limited
room = Stillroom()
app = Flask(__name__)
def guard():
    StillroomLimits(app, room)
app.add_url_rule("/login", "login", limited(AUTH)(lambda: ""), methods=["GET", "POST"])
app.add_url_rule("/right", "right", limited(AUTH, count="failures")(lambda: ""))
app.add_url_rule("/post", "post", limited(AUTH)(lambda: ""), methods=["POST"])
app.add_url_rule("/when", "when", limited(AUTH, exempt_when=lambda request: True)(lambda: ""))
app.add_url_rule("/a", "a", limited(Limit("api", 5, 60))(lambda: ""))
app.add_url_rule("/b", "b", limited(Limit("api", 6, 60))(lambda: ""))
app.add_url_rule("/lost", "lost", lost := lambda: "")
limited(AUTH)(lost)
app.add_url_rule("/unasked", "unasked", unasked := lambda: "")
fresh(600)(unasked)
""",
    "fastapi": """
from fastapi import Depends, FastAPI
from stillroom import AUTH, AsyncStillroom, Limit
from stillroom.web.asgi import StillroomMiddleware
from stillroom.web.fastapi import limited
room = AsyncStillroom()
app = FastAPI()
def guard():
    app.add_middleware(StillroomMiddleware, room=room)
async def view(): ...
def needs(limit, **options):
    return [Depends(limited(limit, **options))]
app.add_api_route("/login", view, methods=["GET", "POST"], dependencies=needs(AUTH))
app.add_api_route("/right", view, dependencies=needs(AUTH, count="failures"))
app.add_api_route("/post", view, dependencies=needs(AUTH), methods=["POST"])
app.add_api_route("/when", view, dependencies=needs(AUTH, exempt_when=lambda request: True))
app.add_api_route("/a", view, dependencies=needs(Limit("api", 5, 60)))
app.add_api_route("/b", view, dependencies=needs(Limit("api", 6, 60)))
""",
    "starlette": """
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from stillroom import AUTH, AsyncStillroom, Limit
from stillroom.web.asgi import StillroomMiddleware
from stillroom.web.starlette import limited
room = AsyncStillroom()
async def view(request): ...
async def lost(request): ...
limited(AUTH)(lost)
def guard():
    global app
    app = StillroomMiddleware(inner, room)
inner = Starlette(routes=[
    Route("/lost", lost),
    Route("/login", limited(AUTH)(view), methods=["GET", "POST"]),
    Route("/right", limited(AUTH, count="failures")(view)),
    Route("/post", limited(AUTH)(view), methods=["POST"]),
    Route("/when", limited(AUTH, exempt_when=lambda request: True)(view)),
    Mount("/in", routes=[Route("/a", limited(Limit("api", 5, 60))(view))]),
    Route("/b", limited(Limit("api", 6, 60))(view)),
])
""",
}


@limited(AUTH)
def login(request: Any) -> None: ...


class DjangosUrls:
    urlpatterns = [  # noqa: RUF012 - as Django has it
        path("login", login),
        path("post", require_POST(login)),
        path("team/", limited(AUTH)(include([path("x", lambda request: None)]))),
    ]


@pytest.fixture
def check(
    server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., dict[str, str]]]:
    """Return the findings of the command in a module: status and sentence."""
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("STILLROOM_SESSION_PEPPERS", "p" * 40)
    for name, value in PATIENT.items():
        monkeypatch.setenv(f"STILLROOM_{name.upper()}", str(value))
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"checked_{abs(hash(tmp_path)):x}"

    def check(source: str, *options: str, code: int = 0) -> list[str]:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setenv("STILLROOM_LOADERS", name)
        result = CliRunner().invoke(app, ["check", "--json", *options])
        assert result.exit_code == code, (result.output, result.exception)
        return [" ".join(line.values()) for line in json.loads(result.output)]

    yield check
    made = sys.modules.pop(name, None)
    if hasattr(made, "room") and inspect.isawaitable(closing := made.room.close()):
        asyncio.run(closing)


def said(lines: list[str], *words: str) -> bool:
    return any(all(word in line for word in words) for line in lines)


def test_what_is_right_is_said(check: Callable[..., list[str]]) -> None:
    """The command confirms versions, settings, loaders, routes and rights, and warns when no worker refreshes."""
    lines = check(GOOD)
    for words in (
        ("pass versions", "stillroom"),
        ("pass loaders 1: product",),
        ("pass routes", "(1)"),
        ("pass rights to cache",),
        ("warn workers", "no worker was seen"),
    ):
        assert said(lines, *words), lines
    assert not said(lines, "fail")
    check(GOOD, "--strict", code=1)
    offline = check(GOOD, "--offline")
    assert not said(offline, "rights")


def test_what_breaks_a_promise_is_named(check: Callable[..., list[str]]) -> None:
    """A broken promise is named with its loader, route or limit and what to write."""
    lines = check(BAD, "--offline")
    for words in (
        ("warn loader product", "swr (1 s) is shorter than its lease"),
        ("warn routes", "/login has auth on GET", "methods=['POST']"),
        ("warn routes", "/lgoin fits no endpoint", "did you mean /login?"),
        ("warn routes", "/x is never reached: /x comes first"),
        ("warn routes", "api is 5/60 s here and 6/60 s there"),
    ):
        assert said(lines, *words), lines


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_page_that_no_app_has_installed_is_named(
    check: Callable[..., list[str]], is_installed: bool
) -> None:
    """A page is cached nowhere where `Pages.install` was forgotten, and the command says so."""
    lines = check(PAGES + "pages.install(app)\n" * is_installed, "--offline")
    assert said(lines, "warn page", "Pages.install(app) was not called") is not is_installed


@pytest.mark.parametrize("framework", VIEWS)
def test_the_limits_of_views_are_looked_at_too(
    check: Callable[..., list[str]], framework: str
) -> None:
    """Limits that views carry are looked at as those of a table are, and an app that charges none of them fails."""
    lines = check(VIEWS[framework] + "guard()\n", "--offline")
    assert said(lines, "warn views", "/login has auth on GET", "count='failures'"), lines
    assert said(lines, "warn views", "api is 5/60 s here and 6/60 s there")
    assert said(lines, "pass views", "6 views with limits")
    assert said(lines, "lost has a @limited that the app does not know") == (framework != "fastapi")
    assert said(lines, "unasked has a @fresh that the app does not") == (framework == "flask")
    for right in ("/right", "/post", "/when"):
        assert not said(lines, f" {right} ")
    check(VIEWS[framework] + "guard()\n", "--offline", "--strict", code=1)


@pytest.mark.parametrize("framework", VIEWS)
def test_views_whose_limits_nothing_charges_fail(
    check: Callable[..., list[str]], framework: str
) -> None:
    """Views that carry limits fail the check where nothing in the app charges them."""
    lines = check(VIEWS[framework], "--offline", code=1)
    assert said(lines, "fail views", "/login carries limits, and nothing in the app charges them")


def test_the_limits_of_djangos_views_are_looked_at(
    check: Callable[..., list[str]],
) -> None:
    """Django's views are found through its settings, with the methods that its own decorators let through."""
    import tests.web.test_django  # noqa: F401 - configures Django, once for all tests

    limits = "stillroom.web.django.limits.LimitsMiddleware"
    for middleware, code in (([limits], 0), ([], 1)):
        with override_settings(ROOT_URLCONF=DjangosUrls, MIDDLEWARE=middleware):
            lines = check(DJANGO, "--offline", code=code)
        assert said(lines, "warn views", "/login has auth on GET"), lines
        assert said(lines, "warn views", "/team/x has auth on GET")
        assert not said(lines, "/post")
        assert said(lines, "fail views", "nothing in the app charges them") == bool(code)


def test_a_name_that_no_limit_has_is_told(
    check: Callable[..., list[str]], make_room: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A rule of abuse or a change at run time that names a limit nobody has is told."""
    rules = tmp_path / "abuse.toml"
    each = 'each = { "denied:lgoin" = 1, "denied:auth" = 2, denied = 9 }'
    rules.write_text(f"[rules.ipv6_rotation]\n{each}\n")
    monkeypatch.setenv("STILLROOM_ABUSE_RULES", str(rules))
    login = 'Limit("login", 5, 300)'
    source = GOOD.replace("[AUTH]", f"[AUTH, {login}]").replace("AUTH,", "AUTH, Limit,", 1)
    make_room().limits.change("shop", 5, 60, 600)
    lines = check(source)
    assert said(lines, "warn rule ipv6_rotation", "denials by lgoin", "did you mean login?"), lines
    assert said(lines, "warn limits", "shop is changed, and nothing has a limit of this name")
    assert not said(lines, "by auth")
    make_room().limits.check("203.0.113.7", [Limit("shop", 5, 60)])
    assert not said(check(source), "warn limits")


def test_what_cannot_be_imported_fails(check: Callable[..., list[str]]) -> None:
    """A module that cannot be imported fails the check, as with a tag's template without its argument."""
    lines = check(BROKEN, "--offline", code=1)
    assert said(lines, "fail", "{nmber}", "did you mean {number}?"), lines


@pytest.mark.parametrize("end", ["SystemExit(0)", "SystemExit('bye')", "GeneratorExit"])
def test_a_module_that_ends_the_process_fails(check: Callable[..., list[str]], end: str) -> None:
    """A module that ends the process while it is imported, also with exit code 0, fails the check."""
    lines = check(f"raise {end}", "--offline", code=1)
    assert said(lines, "fail", end.partition("(")[0]), lines


def test_settings_that_cannot_be_fail(
    check: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad settings fail the check, and a missing one is named."""
    monkeypatch.delenv("STILLROOM_SESSION_PEPPERS")
    monkeypatch.delenv("REDIS_URL")
    lines = check(GOOD, "--offline")
    assert said(lines, "warn settings", "REDIS_URL is not set")
    assert said(lines, "warn settings", "STILLROOM_SESSION_PEPPERS is not set")
    monkeypatch.setenv("STILLROOM_PRODUCTION", "1")
    check(GOOD, "--offline", code=1)
    monkeypatch.setenv("STILLROOM_TTLL", "5")
    assert said(check(GOOD, "--offline", code=1), "fail settings", "did you mean STILLROOM_TTL")


def test_settings_that_name_what_there_is_not_are_told(
    check: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, server: Any, tmp_path: Path
) -> None:
    """A folder of images that is not there, and a finding that does not exist, are named by check and doctor."""
    monkeypatch.setenv("STILLROOM_IMAGE_ROOT", str(tmp_path / "imges"))
    monkeypatch.setenv("STILLROOM_HEALTH_ACCEPT", "server_olld paused")
    doctors = CliRunner().invoke(app, ["doctor", "--json"]).output
    for lines in (
        check(GOOD, "--offline"),
        [" ".join(line.values()) for line in json.loads(doctors)],
    ):
        assert said(
            lines, "warn settings STILLROOM_IMAGE_ROOT is", "imges: there is no such folder"
        )
        assert said(lines, "warn settings", "server_olld is no finding; did you mean server_old?")
        assert not said(lines, "paused is no finding")


def test_away_is_a_failure(
    check: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When Redis is away the check fails, unless it was told not to ask."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    assert said(check(GOOD, code=1), "fail redis", "refused")
    check(GOOD, "--offline")


def test_the_doctor_knows_a_system_that_has_just_started(
    server: Any, make_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a system's first minute the doctor misses no tick, and later it does."""
    monkeypatch.setenv("REDIS_URL", server.url)
    for name, value in PATIENT.items():
        monkeypatch.setenv(f"STILLROOM_{name.upper()}", str(value))
    monkeypatch.setattr(sys.modules["stillroom.cli.doctor"], "JUST_STARTED_S", 0.0)
    assert "no tick was seen" in CliRunner().invoke(app, ["doctor"]).output
    monkeypatch.setattr(sys.modules["stillroom.cli.doctor"], "JUST_STARTED_S", 90.0)
    make_room().upkeep.record_heartbeat("one", WorkerStats(up_s=20.0))
    assert "beat: just started" in CliRunner().invoke(app, ["doctor"]).output


DJANGO_PROJECT = {
    "shop/__init__.py": "",
    "shop/settings.py": """
INSTALLED_APPS = ["shop"]
ROOT_URLCONF = "shop.urls"
MIDDLEWARE = ["stillroom.web.django.limits.LimitsMiddleware"]
SECRET_KEY = "of a test"
""",
    "shop/models.py": """
from django.db import models
class Book(models.Model):
    title = models.CharField(max_length=100)
""",
    "shop/urls.py": """
from django.http import HttpResponse
from django.urls import path
from shop.models import Book
from stillroom import AUTH
from stillroom.web.django.limits import limited
urlpatterns = [path("login", limited(AUTH)(lambda request: HttpResponse()))]
""",
    "shop/caching.py": """
from django.core.handlers.wsgi import WSGIHandler
from shop.models import Book
from stillroom.web.django import room
application = WSGIHandler()
@room().cache.cached("book:{number}")
def load_book(number: int) -> str:
    return Book.objects.get(id=number).title
""",
}


@pytest.mark.parametrize(
    ("loaders", "command"),
    [
        ("shop.caching", ["check", "--offline"]),
        ("", ["check", "--offline", "--app", "shop.caching:application"]),
        ("", ["routes", "/login", "--app", "shop.caching:application"]),
    ],
    ids=lambda given: given if isinstance(given, str) else given[0],
)
def test_a_command_imports_what_a_worker_does(
    tmp_path: Path, loaders: str, command: list[str]
) -> None:
    """The app's modules are found in the current folder, and Django is set up before they are imported."""
    for name, source in DJANGO_PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    environment = {"DJANGO_SETTINGS_MODULE": "shop.settings", "STILLROOM_LOADERS": loaders}
    done = run_to_end(
        [STILLROOM, *command, "--json"],
        cwd=tmp_path,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "auth" in done.stdout
    assert not loaders or "1: load_book" in done.stdout


def test_a_command_needs_no_django_that_its_modules_do_not_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DJANGO_SETTINGS_MODULE stops no command where there is no module to import, or no Django."""
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "of.another.project")
    assert apps_of([]) == []
    monkeypatch.setitem(sys.modules, "django", None)
    assert apps_of(["json:dumps"]) == [("json:dumps", json.dumps)]
