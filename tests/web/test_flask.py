"""Flask's own session works on the room as Flask's users know it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flask
import pytest
from flask_login import LoginManager

from stillroom import SessionStoreUnavailable, Settings, Stillroom
from stillroom.web.flask import StillroomLimits, StillroomSessions
from tests.support.web import Browser, serving_wsgi


def make_app(room: Stillroom) -> flask.Flask:
    app = flask.Flask("shop")
    app.session_interface = StillroomSessions(room)

    @app.get("/plain")
    def plain() -> str:
        return "plain"

    @app.get("/cart/add/<item>")
    def add(item: str) -> list[str]:
        flask.session.permanent = True
        flask.session.setdefault("cart", []).append(item)
        return list(flask.session["cart"])

    @app.get("/deep/<item>")
    def deep(item: str) -> str:
        flask.session["cart"].append(item)
        return "appended"

    @app.get("/cart")
    def cart() -> list[str]:
        return list(flask.session.get("cart", []))

    @app.get("/login/<who>")
    def login(who: str) -> str:
        flask.session.login(who)  # type: ignore[attr-defined]
        flask.flash(f"Welcome, {who}", "greeting")
        return who

    @app.get("/flashes")
    def flashes() -> list[Any]:
        return [list(one) for one in flask.get_flashed_messages(with_categories=True)]

    @app.get("/logout")
    def logout() -> str:
        flask.session.logout()  # type: ignore[attr-defined]
        return "bye"

    @app.get("/fail")
    def fail() -> str:
        flask.session["cart"] = ["lost"]
        raise ZeroDivisionError

    return app


@pytest.fixture
def browser(room: Stillroom) -> Iterator[Browser]:
    with serving_wsgi(make_app(room)) as port:
        yield Browser(port)


def test_a_session_is_kept_and_costs_nothing_unless_looked_at(
    browser: Browser, room: Stillroom
) -> None:
    """Data begins a session, a list may change in place, and a session that was not used costs nothing."""
    assert browser.get("/plain").all("set-cookie") == []
    assert browser.get("/cart").text == "[]\n"
    assert browser.token is None
    browser.get("/cart/add/tea")
    assert browser.token
    browser.get("/deep/jam")
    reply = browser.get("/cart")
    assert (reply.text, reply.all("vary")) == ('["tea","jam"]\n', ["Cookie"])
    assert "vary" not in dict(browser.get("/plain").headers)


def test_login_flash_and_logout(browser: Browser, room: Stillroom) -> None:
    """A login changes the token and keeps the cart, a flash is shown once, and a logout forgets the cookie."""
    browser.get("/cart/add/tea")
    before = browser.token
    browser.get("/login/ann")
    assert browser.token != before
    assert room.sessions.count("ann") == 1
    assert browser.get("/flashes").text == '[["greeting","Welcome, ann"]]\n'
    assert browser.get("/flashes").text == "[]\n"
    assert browser.get("/cart").text == '["tea"]\n'
    assert browser.get("/logout").token == ""
    assert room.sessions.count("ann") == 0


def test_a_failed_request_keeps_nothing(browser: Browser) -> None:
    """When a view raises, its changes to the session are not kept."""
    browser.get("/cart/add/tea")
    assert browser.get("/fail").status == 500
    assert browser.get("/cart").text == '["tea"]\n'


def test_redis_away_is_a_503_and_no_logout(browser: Browser, room: Stillroom) -> None:
    """When Redis is away, using the session is a 503 with Retry-After and keeps the cookie.

    Other views are served.
    """
    browser.get("/cart/add/tea")
    away = Stillroom(Settings(redis_url="redis://127.0.0.1:1", session_peppers="p" * 40))
    with serving_wsgi(make_app(away)) as port:
        for token, path in ((browser.token, "/cart"), (None, "/cart/add/tea")):
            reply = Browser(port, token).get(path)
            assert (reply.status, reply.one("retry-after")) == (503, "2")
            assert reply.one("content-type") == "application/problem+json"
            assert reply.token is None
        assert Browser(port, browser.token).get("/plain").status == 200
    away.close()


def test_redis_away_is_told_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """A request that wants its session while Redis is away is one line in the log; an error has its traceback."""
    away = Stillroom(Settings(redis_url="redis://127.0.0.1:1", session_peppers="p" * 40))
    with serving_wsgi(make_app(away)) as port:
        for _ in range(2):
            assert Browser(port, "00." + "A" * 43).get("/cart").status == 503
        assert Browser(port).get("/fail").status == 500
    away.close()
    said = [one for one in caplog.records if "for want of its session" in one.message]
    assert [(one.levelname, one.exc_info) for one in said] == [("WARNING", None)] * 2
    assert [one.message for one in caplog.records if one.exc_info] == ["Exception on /fail [GET]"]


def with_pages(app: flask.Flask, *kinds: Any) -> None:
    """Give the app error pages whose layout shows who is logged in."""

    def page(error: Exception) -> Any:
        return f"{flask.session.get('user')}: sorry", getattr(error, "code", 500)

    for kind in kinds:
        app.register_error_handler(kind, page)


def with_flask_login(app: flask.Flask) -> None:
    """Give the app Flask-Login, whose `after_request` function looks at the session of each request."""
    app.secret_key = "of Flask-Login's own cookie"
    LoginManager(app).user_loader(lambda user: None)


@pytest.mark.parametrize("limits", [False, True], ids=["sessions", "limits too"])
@pytest.mark.parametrize(
    "more",
    [
        lambda app: with_pages(app, 500),
        lambda app: with_pages(app, 404, 500),
        lambda app: with_pages(app, Exception),
        with_flask_login,
    ],
    ids=["500", "404 and 500", "Exception", "Flask-Login"],
)
def test_redis_away_is_a_503_whatever_looks_at_the_session_then(more: Any, limits: bool) -> None:
    """An error page, or an `after_request` function, that looks at the session again leaves the answer a 503."""
    away = Stillroom(Settings(redis_url="redis://127.0.0.1:1", session_peppers="p" * 40))
    app = make_app(away)
    more(app)
    if limits:
        StillroomLimits(app, away)
    with serving_wsgi(app) as port:
        paths = ("/cart", *(["/missing"] if 404 in app.error_handler_spec[None] else []))
        for path in paths * 2:
            reply = Browser(port, "00." + "A" * 43).get(path)
            assert (reply.status, reply.one("retry-after"), reply.token) == (503, "2", None)
            assert reply.one("content-type") == "application/problem+json"
        assert Browser(port).get("/plain").status == 200
    away.close()


def test_an_error_of_the_app_s_own_keeps_its_page(browser: Browser, room: Stillroom) -> None:
    """After a session that could not be read, an app's own errors are answered by its own page, and propagated."""
    away = Stillroom(Settings(redis_url="redis://127.0.0.1:1", session_peppers="p" * 40))
    app = make_app(away)
    app.register_error_handler(500, lambda error: ("sorry", 500))
    with serving_wsgi(app) as port:
        assert Browser(port, "00." + "A" * 43).get("/cart").status == 503
        reply = Browser(port).get("/fail")
        assert (reply.status, reply.text) == (500, "sorry")
    app.testing = True
    client = app.test_client(use_cookies=False)
    with pytest.raises(ZeroDivisionError):
        client.get("/fail")
    with pytest.raises(SessionStoreUnavailable):
        client.get("/cart", headers={"Cookie": "__Host-sid=00." + "A" * 43})
    away.close()


def test_flasks_own_test_client_can_set_a_session(room: Stillroom) -> None:
    """Flask's own test client sets a session with `session_transaction`, as apps' tests do."""
    with make_app(room).test_client() as client:
        with client.session_transaction(base_url="https://localhost") as session:
            session["cart"] = ["tea"]
        assert client.get("/cart", base_url="https://localhost").json == ["tea"]
