"""docs/recipes.md: each of its blocks is served as it stands, and does what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stillroom import Settings, Stillroom
from tests.support.web import Browser, environment_of, serving_process

RECIPES = (Path(__file__).parent.parent.parent / "docs/recipes.md").read_text(encoding="utf-8")
GUNICORN = ("gunicorn", "--bind", "fd://{fd}", "--log-level", "warning", "--no-control-socket")
UVICORN = ("uvicorn", "--fd", "{fd}", "--log-level", "warning", "--no-proxy-headers")

# What a Django project has besides.
URLS = """
import json
from django.contrib.auth import SESSION_KEY
from django.http import JsonResponse
from django.urls import path

def login(request, user):
    request.session.cycle_key()
    request.session[SESSION_KEY] = user
    return JsonResponse({"user": user})

def add(request, item):
    request.session["cart"] = [*request.session.get("cart", []), item]
    return JsonResponse({"user": request.session.get(SESSION_KEY), "cart": request.session["cart"]})

urlpatterns = [path("login/<user>", login), path("cart/<item>", add)]
"""
SETTINGS = 'ROOT_URLCONF, ALLOWED_HOSTS, SECRET_KEY, USE_TZ = "urls", ["*"], "x" * 50, True\n'


def blocks(heading: str) -> list[str]:
    """The Python blocks under a heading."""
    section = RECIPES.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def settings(stillroom_settings: Settings) -> Settings:
    """What servers and frameworks do does not depend on which Redis it is."""
    return stillroom_settings


@pytest.fixture
def environment(settings: Settings) -> dict[str, str]:
    return environment_of(settings)


def shopping(port: int, room: Stillroom) -> None:
    """The story all recipes tell: a cart, a login that keeps it under a new token, a limit on logins."""
    browser = Browser(port)
    assert json.loads(browser.get("/cart/tea").text) == {"user": None, "cart": ["tea"]}
    before = browser.token
    assert browser.get("/login/ann").status == 200
    assert browser.token
    assert browser.token != before
    assert json.loads(browser.get("/cart/jam").text) == {"user": "ann", "cart": ["tea", "jam"]}
    assert room.sessions.count("ann") == 1
    statuses = [browser.get("/login/ann").status for _ in range(5)]
    assert statuses == [200] * 4 + [429]


def test_fastapi(tmp_path: Path, environment: dict[str, str], room: Stillroom) -> None:
    """Three lines and a dependency."""
    (tmp_path / "shop.py").write_text(blocks("FastAPI and Starlette")[0])
    with serving_process([*UVICORN, "shop:app"], tmp_path, environment) as port:
        shopping(port, room)


def test_flask(tmp_path: Path, environment: dict[str, str], room: Stillroom) -> None:
    """Flask's own session object."""
    (tmp_path / "shop.py").write_text(blocks("Flask")[0])
    with serving_process([*GUNICORN, "--threads", "4", "shop:app"], tmp_path, environment) as port:
        shopping(port, room)


def test_django(tmp_path: Path, environment: dict[str, str], room: Stillroom) -> None:
    """Settings alone, and the limits around the WSGI application."""
    settings, wsgi = blocks("Django")
    (tmp_path / "settings.py").write_text(settings + SETTINGS)
    (tmp_path / "wsgi.py").write_text(wsgi)
    (tmp_path / "urls.py").write_text(URLS)
    named = {**environment, "DJANGO_SETTINGS_MODULE": "settings"}
    with serving_process([*GUNICORN, "wsgi:application"], tmp_path, named) as port:
        shopping(port, room)


def test_no_framework(tmp_path: Path, environment: dict[str, str]) -> None:
    """A WSGI function."""
    (tmp_path / "shop.py").write_text(blocks("No framework")[0])
    with serving_process([*GUNICORN, "shop:app"], tmp_path, environment) as port:
        browser = Browser(port)
        assert [browser.get("/").text for _ in range(3)] == ["1", "2", "3"]
