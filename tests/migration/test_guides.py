"""Each guide of docs/migration has code from before and after that is run and gives the same answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, session

from shop.demo.browser import Browser as Visitor
from stillroom import Settings, Stillroom
from stillroom.web.flask import StillroomSessions
from tests.support import nursery
from tests.support.guide import DOCS, write_files
from tests.support.web import GUNICORN, UVICORN, Browser, environment_of, serving_process


@pytest.fixture
def environment(stillroom_settings: Settings) -> dict[str, str]:
    return environment_of(stillroom_settings)


def story(folder: Path, environment: dict[str, str], code: str) -> Any:
    """Run a program in the folder; return the JSON it printed."""
    done = nursery.run_text(["-c", code], {**os.environ, **environment}, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


DJANGO = """
import json, django
from django.conf import settings
import {0} as chosen
given = {{name: getattr(chosen, name) for name in ("CACHES", "SESSION_ENGINE")}}
settings.configure(**given, USE_TZ=True, SECRET_KEY="x" * 50)
django.setup()
import app, own_{0}
from importlib import import_module
store = import_module(settings.SESSION_ENGINE).SessionStore()
store["cart"] = ["jam"]
store.save()
print(json.dumps([app.visit(), own_{0}.change(), dict(store.__class__(store.session_key).items())]))
"""


def test_django_redis(tmp_path: Path, environment: dict[str, str]) -> None:
    """An app on django-redis answers the same on Stillroom, with other words for django-redis' own calls."""
    pytest.importorskip("django_redis")
    write_files("migration/django-redis.md", tmp_path)
    before = story(tmp_path, environment, DJANGO.format("before"))
    after = story(tmp_path, environment, DJANGO.format("after"))
    assert before == after
    assert before[1] == [None, 3, True]


def shop_with_cart(port: int) -> list[Any]:
    """Let a visitor put two things into the cart, look twice, log out, and look again."""
    asked = [("POST", "/cart/jam"), ("POST", "/cart/tea"), *[("GET", "/cart")] * 2]
    with Visitor(port) as visitor:
        said = [visitor.ask(*one) for one in [*asked, ("POST", "/logout"), ("GET", "/cart")]]
    assert {one.status for one in said} == {200}
    return [json.loads(one.text) for one in said]


def test_flask_session(tmp_path: Path, environment: dict[str, str]) -> None:
    """A cart, flashes and a logout are the same for a visitor before and after."""
    pytest.importorskip("flask_session")
    write_files("migration/flask-session.md", tmp_path)
    seen = []
    for name in ("before", "after"):
        (tmp_path / f"served_{name}.py").write_text(
            f"import app as views\nfrom {name} import app\nviews.register(app)\n"
        )
        with serving_process([*GUNICORN, f"served_{name}:app"], tmp_path, environment) as port:
            seen.append(shop_with_cart(port))
    assert seen[0] == seen[1]
    assert seen[0][2]["cart"] == ["jam", "tea"]
    assert seen[0][5] == {"cart": [], "flashes": []}


def test_a_session_is_kept_when_the_browser_is_closed_only_if_it_is_permanent(
    stillroom_settings: Settings,
) -> None:
    """Flask-Session makes each session permanent, Flask and Stillroom those that a view makes so."""
    defaults = pytest.importorskip("flask_session.defaults")
    assert defaults.Defaults.SESSION_PERMANENT
    app = Flask(__name__)
    with Stillroom(stillroom_settings) as room:
        app.session_interface = StillroomSessions(room)

        @app.get("/<int:permanent>")
        def visit(permanent: int) -> str:
            session.permanent, session["seen"] = bool(permanent), True
            return ""

        said = [
            app.test_client().get(f"/{n}", base_url="https://shop").headers["Set-Cookie"]
            for n in (0, 1)
        ]
    assert ["Max-Age" in cookie for cookie in said] == [False, True]


def statuses(port: int, path: str, times: int) -> list[int]:
    return [Browser(port).get(path).status for _ in range(times)]


@pytest.mark.parametrize(
    ("server", "before", "after", "needs"),
    [
        (UVICORN, "fast_before:app", "fast_after:app", "slowapi"),
        (GUNICORN, "flask_before:app", "flask_after:app", "flask_limiter"),
    ],
    ids=["slowapi", "Flask-Limiter"],
)
def test_limits(
    tmp_path: Path,
    environment: dict[str, str],
    server: tuple[str, ...],
    before: str,
    after: str,
    needs: str,
) -> None:
    """The limit of three searches a minute is the same before and after."""
    pytest.importorskip(needs)
    write_files("migration/slowapi-flask-limiter.md", tmp_path)
    for app in (before, after):
        with serving_process([*server, app], tmp_path, environment) as port:
            assert statuses(port, "/search", 5) == [200] * 3 + [429] * 2, app


def attempts(port: int) -> list[int]:
    """Make two right logins, then wrong ones."""
    kind = {"Content-Type": "application/json"}
    words = [*["quince"] * 2, *["wrong"] * 3]
    bodies = [json.dumps({"password": word}).encode() for word in words]
    return [Browser(port).get("/login", "POST", kind, body).status for body in bodies]


def test_only_wrong_logins_count(tmp_path: Path, environment: dict[str, str]) -> None:
    """Right logins use nothing up, and the third wrong one is refused, before and after."""
    pytest.importorskip("flask_limiter")
    write_files("migration/slowapi-flask-limiter.md", tmp_path)
    for app in ("flask_before:app", "flask_after:app"):
        with serving_process([*GUNICORN, app], tmp_path, environment) as port:
            assert attempts(port) == [200, 200, 401, 401, 429], app


CASHEWS = """
import asyncio, json, {0} as chosen
async def main():
    try:
        return await chosen.story()
    finally:
        await chosen.close()
print(json.dumps(asyncio.run(main())))
"""


def test_cashews(tmp_path: Path, environment: dict[str, str]) -> None:
    """A value is loaded once, and again after its tag was invalidated."""
    pytest.importorskip("cashews")
    write_files("migration/cashews-fastapi-cache.md", tmp_path)
    before = story(tmp_path, environment, CASHEWS.format("cashews_before"))
    after = story(tmp_path, environment, CASHEWS.format("cashews_after"))
    assert before == after == [351, 351, 352, "imported"]


def test_fastapi_cache(tmp_path: Path, environment: dict[str, str]) -> None:
    """A page is rendered once, and again after an edit."""
    pytest.importorskip("fastapi_cache")
    write_files("migration/cashews-fastapi-cache.md", tmp_path)
    for app in ("fastapi_before:app", "fastapi_after:app"):
        with serving_process([*UVICORN, app], tmp_path, environment) as port:
            seen = [Browser(port).get("/price/7").text for _ in range(2)]
            Browser(port).get("/price/7", "PUT")
            seen.append(Browser(port).get("/price/7").text)
        assert [json.loads(text)["cents"] for text in seen] == [351, 351, 352], app


def test_every_guide_is_run() -> None:
    """Every migration guide has a test here."""
    known = {
        "index",
        "django-redis",
        "flask-session",
        "slowapi-flask-limiter",
        "cashews-fastapi-cache",
    }
    assert {page.stem for page in (DOCS / "migration").glob("*.md")} == known
