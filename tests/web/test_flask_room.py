"""`room.init_app(app)` gives an app sessions, limits, health and a time budget, with a factory or without one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, current_app, session

from stillroom import (
    AUTH,
    AsyncStillroom,
    NoDispatch,
    Route,
    Routes,
    Settings,
    SettingsError,
    Stillroom,
)
from stillroom.web.flask_room import current_room
from stillroom.web.session_cookie import SessionCookie
from stillroom.wire import time_left
from stillroom_workers.lifecycle import open_room


@pytest.fixture
def shop(settings: Settings) -> Iterator[Stillroom]:
    """Return the app's room, made at module level in an app."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        yield room


def create_app(room: Stillroom, **options: Any) -> Flask:
    app = Flask("shop")
    app.config["PRICE"] = 7
    room.init_app(app, cookie=SessionCookie("sid", secure=False), **options)

    @app.get("/add/<item>")
    def add(item: str) -> Any:
        session.setdefault("cart", []).append(item)
        return session["cart"]

    @app.get("/time")
    def time() -> Any:
        budget = time_left()
        return {
            "seconds": None if budget is None else round(budget.left),
            "same": current_room == room,
        }

    return app


def test_a_setting_in_the_apps_config_is_told(
    shop: Stillroom, caplog: pytest.LogCaptureFixture
) -> None:
    """A setting in `app.config` is told once, with where to write it, unless the room has it from elsewhere."""
    app = Flask("shop")
    app.config.update(STILLROOM_TTL=60, STILLROOM_CALL_TIMEOUT=1, STILLROOM_OF_MY_OWN=1)
    shop.init_app(app, sessions=False)
    (said,) = [record.getMessage() for record in caplog.records if "app.config" in record.msg]
    assert said.startswith("STILLROOM_TTL in app.config changes nothing")
    assert said.endswith("Stillroom(ttl=…)")


def test_an_app_has_sessions_limits_and_a_budget(shop: Stillroom) -> None:
    """init_app gives an app sessions, limits and a budget in one line."""
    app = create_app(shop, routes=Routes([Route("/time", [AUTH])]), health=True)
    client = app.test_client()
    assert client.get("/add/tea").json == ["tea"]
    assert client.get("/add/jam").json == ["tea", "jam"]
    assert client.get("/time").json == {"seconds": 30, "same": True}
    assert [client.get("/time").status_code for _ in range(5)] == [200] * 4 + [429]
    assert client.get("/health/live").status_code == 200
    assert app.extensions["stillroom"] is shop


def test_it_leaves_out_what_is_not_wanted(shop: Stillroom) -> None:
    """init_app can leave out parts: Flask's own sessions stay, and there is no /health."""
    app = Flask("shop")
    before = app.session_interface
    shop.init_app(app, sessions=False)
    shop.init_app(app)  # once is enough
    assert app.session_interface is before
    assert app.test_client().get("/health/live").status_code == 404


def test_a_loader_runs_in_the_app_s_context(shop: Stillroom) -> None:
    """A loader runs in the request's app context. In a script or a worker there is none by itself."""

    @shop.cache.cached("price")
    def price() -> int:
        found: int = current_app.config["PRICE"]
        return found

    app = create_app(shop)
    assert price() == 7
    shop.cache.clear()
    with app.app_context():
        before = current_app._get_current_object()  # type: ignore[attr-defined]
        assert price() == 7
        assert current_app._get_current_object() is before  # type: ignore[attr-defined]
    again = create_app(shop)
    again.config["PRICE"] = 8
    shop.cache.clear()
    assert price() == 8
    assert len(shop.cache.loaders.around) == 1


@pytest.mark.parametrize("says", ["room.init_app(app)", "pass"])
def test_a_worker_loads_in_the_app_s_context(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    """A worker loads in the app's context, and finds the app beside the room by itself."""
    (tmp_path / "flaskshop.py").write_text(
        f"""
from flask import Flask, current_app
from stillroom import NoDispatch, Settings, Stillroom
app = Flask(__name__)
app.config["PRICE"] = 7
room = Stillroom(Settings(redis_url={settings.redis_url!r}), dispatch=NoDispatch())
{says}
@room.cache.cached("price")
def price() -> int:
    return current_app.config["PRICE"]
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    changed = settings.model_copy(update={"loaders": ("flaskshop",)})
    with open_room(changed) as worker:
        loader = worker.cache.loaders["price"]
        assert loader.recipe({}).loading().function() == 7
    del sys.modules["flaskshop"]


@pytest.mark.parametrize("wrong", [{"cookie": "sid"}, {"routes": []}])
def test_options_that_are_refused_leave_the_app_as_it_was(
    shop: Stillroom, wrong: dict[str, Any]
) -> None:
    """After options that were refused, init_app can be called again with right ones."""
    app = Flask("shop")
    own = app.session_interface, app.wsgi_app
    with pytest.raises(ValueError, match="did you mean"):
        shop.init_app(app, **wrong)
    assert (app.session_interface, app.wsgi_app) == own
    assert not app.extensions
    shop.init_app(app, cookie=SessionCookie("sid", secure=False))
    assert app.extensions["stillroom"] is shop


def test_a_cookie_that_browsers_refuse_is_told_where_the_app_is_made(shop: Stillroom) -> None:
    """Flask's settings of a cookie that no browser keeps are refused by init_app, unless it is given a cookie."""
    app = Flask("shop")
    app.config.update(SESSION_COOKIE_NAME="__Host-sid", SESSION_COOKIE_DOMAIN="example.com")
    with pytest.raises(SettingsError, match="__Secure-"):
        shop.init_app(app)
    assert not app.extensions
    shop.init_app(app, cookie=SessionCookie())


@pytest.mark.parametrize("given", [0, -5, None, "3600"])
def test_a_lifetime_of_nothing_is_told_where_the_app_is_made(shop: Stillroom, given: Any) -> None:
    """A lifetime that is over at once, or no time, is refused by init_app, by the name of Flask's setting."""
    app = Flask("shop")
    app.config["PERMANENT_SESSION_LIFETIME"] = given
    with pytest.raises(SettingsError, match="PERMANENT_SESSION_LIFETIME"):
        shop.init_app(app)


def test_mistakes(shop: Stillroom, settings: Settings) -> None:
    """An object that is no app, an async room, a second room and a missing room raise clear errors."""
    app = Flask("shop")
    with pytest.raises(TypeError, match="a Flask app, not object"):
        shop.init_app(object())
    with app.app_context(), pytest.raises(SettingsError, match=r"room\.init_app"):
        bool(current_room.cache)
    shop.init_app(app)
    with pytest.raises(SettingsError, match="called before, without these options"):
        shop.init_app(app, routes=Routes([Route("/login", [AUTH])]))
    with pytest.raises(SettingsError, match="another room already"):
        Stillroom(settings, dispatch=NoDispatch()).init_app(app)
    with pytest.raises(TypeError, match="init"):
        shop.init_app(Flask("other"), rooms=1)
    assert not hasattr(AsyncStillroom, "init_app")
