"""Each block of docs/recipes.md is served as it stands, and does what it says."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from stillroom import Limit, Settings, Stillroom
from tests.support import nursery
from tests.support.sessions import age
from tests.support.web import (
    COOKIE,
    GUNICORN,
    UVICORN,
    Browser,
    Reply,
    ask,
    environment_of,
    serving_process,
)

RECIPES = (Path(__file__).parent.parent.parent / "docs/recipes.md").read_text(encoding="utf-8")

# What a Django project has besides.
SETTINGS = 'ROOT_URLCONF, ALLOWED_HOSTS, SECRET_KEY, USE_TZ = "urls", ["*"], "x" * 50, True\n'
WSGI = "from django.core.wsgi import get_wsgi_application\napplication = get_wsgi_application()\n"


def blocks(heading: str) -> list[str]:
    """Return the Python blocks under a heading."""
    section = RECIPES.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def settings(stillroom_settings: Settings) -> Settings:
    """Return settings for one kind of Redis, because servers and frameworks do not depend on it."""
    return stillroom_settings


@pytest.fixture
def environment(settings: Settings) -> dict[str, str]:
    return environment_of(settings)


def post(browser: Browser, path: str, **given: str) -> Reply:
    headers = {"Content-Type": "application/json"}
    return browser.get(path, "POST", headers, json.dumps(given).encode())


def shopping(port: int, room: Stillroom) -> None:
    """Tell the story of all recipes: a cart, a login that keeps it under a new token, and limits."""
    browser = Browser(port)
    tea = post(browser, "/cart", item="tea")
    assert json.loads(tea.text) == {"user": None, "cart": ["tea"]}
    assert tea.one("x-ratelimit-limit") == "1000"
    before = browser.token
    right = {"user": "ann", "password": "ann's secret"}
    assert post(browser, "/login", **right).status == 200
    assert browser.token
    assert browser.token != before
    jam = post(browser, "/cart", item="jam")
    assert json.loads(jam.text) == {"user": "ann", "cart": ["tea", "jam"]}
    assert room.sessions.count("ann") == 1
    statuses = [post(browser, "/login", **right).status for _ in range(6)]
    assert statuses == [200] * 6, "right logins do not count"
    wrong = right | {"password": "guess"}
    statuses = [post(Browser(port), "/login", **wrong).status for _ in range(7)]
    assert statuses == [401] * 5 + [429] * 2
    assert [browser.get("/export").status for _ in range(4)] == [200] * 3 + [429]
    visitor = Browser(port)
    assert [visitor.get("/export").status for _ in range(4)] == [200] * 3 + [429]


def test_fastapi(tmp_path: Path, environment: dict[str, str], room: Stillroom) -> None:
    """The FastAPI recipe takes two lines and a dependency."""
    (tmp_path / "shop.py").write_text(blocks("FastAPI and Starlette")[0])
    with serving_process([*UVICORN, "shop:app"], tmp_path, environment) as port:
        shopping(port, room)


def test_flask(tmp_path: Path, environment: dict[str, str], room: Stillroom) -> None:
    """The Flask recipe uses Flask's own session object and an extension."""
    (tmp_path / "shop.py").write_text(blocks("Flask")[0])
    with serving_process([*GUNICORN, "--threads", "4", "shop:app"], tmp_path, environment) as port:
        shopping(port, room)


def write_django(folder: Path) -> None:
    settings, urls = blocks("Django")
    (folder / "settings.py").write_text(settings + SETTINGS)
    (folder / "urls.py").write_text(urls)
    (folder / "wsgi.py").write_text(WSGI)


def test_django(tmp_path: Path, environment: dict[str, str], room: Stillroom) -> None:
    """The Django recipe uses settings, a decorator and an include."""
    write_django(tmp_path)
    named = {**environment, "DJANGO_SETTINGS_MODULE": "settings"}
    with serving_process([*GUNICORN, "wsgi:application"], tmp_path, named) as port:
        shopping(port, room)


# The same in the framework's own client, over plain http, as an app's tests do it.

FASTAPI_STORY = """
from fastapi.testclient import TestClient
from shop import app
with TestClient(app) as client:
    def post(path, **given): return client.post(path, json=given)
    def get(path): return client.get(path)
    STORY
"""
FLASK_STORY = """
from shop import app
client = app.test_client()
def post(path, **given): return client.post(path, json=given)
def get(path): return client.get(path)
STORY
"""
DJANGO_STORY = """
import django
django.setup()
from django.test import Client
client = Client()
def post(path, **given): return client.post(path, given, content_type="application/json")
def get(path): return client.get(path)
STORY
"""
STORY = """
assert post("/cart", item="tea").status_code == 200
assert post("/login", user="ann", password="ann's secret").status_code == 200
answer = post("/cart", item="jam")
found = answer.json if isinstance(answer.json, dict) else answer.json()
assert found == {"user": "ann", "cart": ["tea", "jam"]}, found
assert [post("/login", user="ann", password="x").status_code for _ in range(6)] == [401] * 5 + [429]
assert [get("/export").status_code for _ in range(4)] == [200] * 3 + [429]
print("told")
"""


@pytest.mark.parametrize("framework", ["fastapi", "flask", "django"])
def test_the_frameworks_own_client_tells_the_same_story(
    tmp_path: Path, environment: dict[str, str], framework: str, room: Stillroom
) -> None:
    """With the framework's own client a user stays logged in and limits hold."""
    if framework == "django":
        write_django(tmp_path)
        environment["DJANGO_SETTINGS_MODULE"] = "settings"
    else:
        heading = {"fastapi": "FastAPI and Starlette", "flask": "Flask"}[framework]
        (tmp_path / "shop.py").write_text(blocks(heading)[0])
    frame = {"fastapi": FASTAPI_STORY, "flask": FLASK_STORY, "django": DJANGO_STORY}[framework]
    indent = "    " if framework == "fastapi" else ""
    (tmp_path / "story.py").write_text(
        frame.replace(f"{indent}STORY", textwrap.indent(STORY, indent))
    )
    told = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = nursery.run_text(["story.py"], told, tmp_path)
    assert done.stdout == "told\n", done.stdout + done.stderr


def test_a_page_that_asks_again(
    tmp_path: Path, environment: dict[str, str], room: Stillroom, client: Any
) -> None:
    """A sensitive page is 401 after ten minutes until the password is given again, and refuses another
    site's page.
    """
    (tmp_path / "shop.py").write_text(blocks("A page that asks again")[0])
    with serving_process([*UVICORN, "shop:app"], tmp_path, environment) as port:
        browser = Browser(port)
        assert post(browser, "/address", street="x").status == 401
        assert post(browser, "/login", user="ann", password="ann's secret").status == 200
        assert post(browser, "/address", street="x").status == 200
        (device,) = room.sessions.list_for_user("ann")
        age(client, room, device.handle, 601)
        assert post(browser, "/address", street="x").status == 401
        assert post(browser, "/confirm", password="ann's secret").status == 200
        assert json.loads(post(browser, "/address", street="x").text)["user"] == "ann"
        evil = {"Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"}
        assert browser.get("/address", "POST", evil, b'{"street": "y"}').status == 403


def test_flask_login(tmp_path: Path, environment: dict[str, str], room: Stillroom) -> None:
    """With Flask-Login the device list knows the user, "remember me" works, and a logout ends the session."""
    (tmp_path / "shop.py").write_text(blocks("Flask-Login, and Flask's own settings")[0])
    with serving_process([*GUNICORN, "shop:app"], tmp_path, environment) as port:
        for remember in ("yes", "no"):
            browser = Browser(port)
            right = {"user": "ann", "password": "ann's secret", "remember": remember}
            reply = post(browser, "/login", **right)
            cookie = next(line for line in reply.all("set-cookie") if line.startswith(COOKIE))
            assert ("Max-Age=2592000" in cookie) == (remember == "yes")
            assert "SameSite=Strict" in cookie
            assert len(json.loads(browser.get("/devices").text)) == 1
            assert post(browser, "/logout").status == 200
            assert browser.token is None
            assert browser.get("/devices").status == 401
            assert room.sessions.count("ann") == 0


def test_in_front_of_everything(tmp_path: Path, environment: dict[str, str]) -> None:
    """In front of everything static files have their limits, health has none, and the rest has the default."""
    (tmp_path / "shop.py").write_text(blocks("In front of everything")[0])
    with serving_process([*GUNICORN, "shop:app"], tmp_path, environment) as port:
        assert ask(port, "/static/x.css").one("x-ratelimit-limit") == "1000"
        assert ask(port, "/nothing").one("x-ratelimit-limit") == "100"
        assert ask(port, "/health").one("x-ratelimit-limit") is None


def test_limits_of_other_kinds(
    tmp_path: Path, environment: dict[str, str], room: Stillroom
) -> None:
    """Tokens cost what the answer had, places become free again, and a supplier is asked three times a second."""
    (tmp_path / "shop.py").write_text(blocks("Limits of other kinds")[0])
    with serving_process([*UVICORN, "shop:app"], tmp_path, environment) as port:
        browser = Browser(port)
        for text in ("a plum jam", "word " * 150):
            assert post(browser, "/ask", user="ann", text=text).status == 200
        tokens = Limit("tokens", 1_000, 3600, by="user")
        assert room.limits.peek({"user": "ann"}, [tokens]).remaining == 1_000 - 3 - 150
        assert [browser.get("/export").text for _ in range(4)] == ["ab"] * 4
        began = time.monotonic()
        assert [browser.get("/price").status for _ in range(4)] == [200] * 4
        assert time.monotonic() - began >= 0.5
        last = [browser.get("/export").status for _ in range(4)][-1]
        assert last == 200, "more than ten an hour, which only a limit in shadow forbids"


def test_no_framework(tmp_path: Path, environment: dict[str, str]) -> None:
    """A plain WSGI function works without a framework."""
    (tmp_path / "shop.py").write_text(blocks("No framework")[0])
    with serving_process([*GUNICORN, "shop:app"], tmp_path, environment) as port:
        browser = Browser(port)
        assert [browser.get("/").text for _ in range(3)] == ["1", "2", "3"]
