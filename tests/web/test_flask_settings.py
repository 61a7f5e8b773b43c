"""Flask's own settings, and the libraries that use its session, keep their promises."""

from __future__ import annotations

import copy
import datetime
import decimal
import uuid
from collections.abc import Callable
from typing import Any, ClassVar

import flask
import pytest
from flask.views import MethodView
from flask_login import (
    LoginManager,
    UserMixin,
    confirm_login,
    current_user,
    fresh_login_required,
    login_user,
    logout_user,
)
from flask_wtf.csrf import CSRFProtect, generate_csrf
from markupsafe import Markup
from werkzeug.test import Client

from stillroom import SettingsError, Stillroom
from stillroom.web.flask import StillroomSessions, fresh
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.wsgi import StillroomMiddleware
from tests.support.sessions import age
from tests.support.web import Reply, ask, serving_wsgi

PLAIN = SessionCookie("sid", secure=False)
LONGEST = datetime.timedelta(days=3_650)
VALUES = {
    "tuple": (1, ("a", [2])),
    "bytes": b"ab\xff",
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC),
    "uuid": uuid.UUID(int=7),
    "markup": Markup("<b>x</b>"),
    "decimal": decimal.Decimal("1.10"),
    "nested": {"a": [(1, b"\x00")], "b": {"c": datetime.date(2026, 1, 2)}},
}


def make_app(room: Stillroom, cookie: SessionCookie | None = None, **config: Any) -> flask.Flask:
    app = flask.Flask("shop")
    app.secret_key = "of no use outside this test"
    app.config.update(config)
    app.session_interface = StillroomSessions(room, cookie=cookie)

    @app.get("/set/<key>/<value>")
    def set_(key: str, value: str) -> str:
        flask.session[key] = value
        return "set"

    @app.get("/shown")
    def shown() -> Any:
        return {str(key): str(value) for key, value in flask.session.items()}

    @app.get("/permanent/<int:wanted>")
    def permanent(wanted: int) -> str:
        flask.session.permanent = bool(wanted)
        flask.session["user"] = "ann"
        return "set"

    @app.get("/clear")
    def clear() -> str:
        flask.session.clear()
        return "cleared"

    @app.get("/login/<user>")
    def login(user: str) -> str:
        flask.session.login(user)  # type: ignore[attr-defined]
        return user

    @app.get("/me")
    def me() -> Any:
        return {"user": flask.session.user_id}  # type: ignore[attr-defined]

    return app


def put(app: flask.Flask, path: str, view: Callable[[], object], **options: Any) -> None:
    """Add a view of one line whose result is shown as text."""
    app.add_url_rule(path, endpoint=path, view_func=lambda: str(view()), **options)


class Jar:
    """A browser like Flask's own test client, which shows the Set-Cookie header."""

    def __init__(self, app: flask.Flask, name: str = "__Host-sid", **headers: str) -> None:
        self._client = app.test_client(use_cookies=False)
        self._name = name
        self.headers = headers
        self.cookie: str | None = None
        self.token: str | None = None

    def get(self, path: str, method: str = "GET", **given: Any) -> Any:
        headers = {
            **self.headers,
            **({"Cookie": f"{self._name}={self.token}"} if self.token else {}),
        }
        reply = self._client.open(
            path, method=method, headers=headers, base_url="https://localhost", **given
        )
        found = [
            line
            for line in reply.headers.getlist("Set-Cookie")
            if line.startswith(f"{self._name}=")
        ]
        self.cookie = found[0] if found else None
        if self.cookie is not None:
            self.token = self.cookie.partition("=")[2].partition(";")[0] or None
        return reply


# SESSION_COOKIE_*


@pytest.mark.parametrize(
    ("config", "name", "attributes"),
    [
        ({}, "__Host-sid", "Path=/; HttpOnly; SameSite=Lax; Secure"),
        (
            {"SESSION_COOKIE_SAMESITE": "Strict"},
            "__Host-sid",
            "Path=/; HttpOnly; SameSite=Strict; Secure",
        ),
        ({"SESSION_COOKIE_HTTPONLY": False}, "__Host-sid", "Path=/; SameSite=Lax; Secure"),
        (
            {"SESSION_COOKIE_PARTITIONED": True},
            "__Host-sid",
            "Path=/; HttpOnly; SameSite=Lax; Secure; Partitioned",
        ),
        ({"SESSION_COOKIE_NAME": "sid"}, "sid", "Path=/; HttpOnly; SameSite=Lax"),
        ({"SESSION_COOKIE_DOMAIN": False}, "__Host-sid", "Path=/; HttpOnly; SameSite=Lax; Secure"),
        (
            {"SESSION_COOKIE_NAME": "sid", "SESSION_COOKIE_SECURE": True},
            "sid",
            "Path=/; HttpOnly; SameSite=Lax; Secure",
        ),
        (
            {"SESSION_COOKIE_NAME": "__Host-mine"},
            "__Host-mine",
            "Path=/; HttpOnly; SameSite=Lax; Secure",
        ),
        (
            {"SESSION_COOKIE_NAME": "__Host-Http-mine"},
            "__Host-Http-mine",
            "Path=/; HttpOnly; SameSite=Lax; Secure",
        ),
        (
            {"SESSION_COOKIE_DOMAIN": "example.com"},
            "__Secure-sid",
            "Path=/; Domain=example.com; HttpOnly; SameSite=Lax; Secure",
        ),
        (
            {"SESSION_COOKIE_PATH": "/shop"},
            "__Secure-sid",
            "Path=/shop; HttpOnly; SameSite=Lax; Secure",
        ),
        (
            {
                "SESSION_COOKIE_NAME": "sid",
                "SESSION_COOKIE_SAMESITE": "None",
                "SESSION_COOKIE_SECURE": True,
            },
            "sid",
            "Path=/; HttpOnly; SameSite=None; Secure",
        ),
    ],
    ids=str,
)
def test_flasks_settings_say_how_the_cookie_is_kept(
    room: Stillroom, config: dict[str, Any], name: str, attributes: str
) -> None:
    """The cookie is set, found again and forgotten as Flask's settings say."""
    browser = Jar(make_app(room, **config), name)
    browser.get("/set/a/1")
    assert browser.cookie == f"{name}={browser.token}; {attributes}"
    assert browser.get("/shown").json == {"a": "1"}
    browser.get("/clear")
    assert browser.cookie == f"{name}=; Max-Age=0; {attributes}"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"SESSION_COOKIE_NAME": "__Host-sid", "SESSION_COOKIE_DOMAIN": "example.com"},
            "__Secure-",
        ),
        ({"SESSION_COOKIE_SAMESITE": "loose"}, "SESSION_COOKIE_SAMESITE='loose'"),
        ({"SESSION_COOKIE_NAME": "sid", "SESSION_COOKIE_SAMESITE": "None"}, "same_site None"),
        ({"SESSION_COOKIE_NAME": "a b"}, "name='a b'"),
    ],
    ids=str,
)
def test_what_a_browser_would_refuse_is_an_error(
    room: Stillroom, config: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A cookie that a browser would refuse raises at the first request with what is allowed, and nothing else."""
    app = make_app(room, **config)
    assert app.test_client().get("/set/a/1").status_code == 500
    assert [line.message for line in caplog.records] == ["Exception on /set/a/1 [GET]"]
    app.testing = True
    with pytest.raises(SettingsError, match=said):
        app.test_client().get("/set/a/1")


def test_a_cookie_given_to_the_interface_goes_before_flasks_settings(room: Stillroom) -> None:
    """A cookie given to the interface replaces all of Flask's cookie settings."""
    browser = Jar(make_app(room, PLAIN, SESSION_COOKIE_NAME="other"), "sid")
    browser.get("/set/a/1")
    assert browser.cookie == f"sid={browser.token}; Path=/; HttpOnly; SameSite=Lax"


# Permanent


def test_a_session_lasts_as_long_as_the_browser_unless_it_is_permanent(room: Stillroom) -> None:
    """A session lasts as long as the browser unless it is permanent, which may be set either way."""
    for wanted, kept in ((0, None), (1, 604_800)):
        browser = Jar(make_app(room))
        assert browser.get(f"/permanent/{wanted}").status_code == 200
        assert browser.cookie is not None
        assert ("Max-Age" in browser.cookie) == bool(wanted)
        if kept:
            assert f"Max-Age={kept};" in browser.cookie


def test_a_session_that_becomes_permanent_gets_another_cookie(room: Stillroom) -> None:
    """A session gets another cookie when it becomes permanent, or no longer is; setting it again sends none."""
    browser = Jar(make_app(room))
    browser.get("/permanent/0")
    for wanted in (1, 0, 1):
        before = browser.token
        browser.get(f"/permanent/{wanted}")
        assert browser.token != before
        assert ("Max-Age" in str(browser.cookie)) == bool(wanted)
        browser.get(f"/permanent/{wanted}")
        assert browser.cookie is None
    assert room.sessions.count() == 1


def test_permanence_alone_begins_a_session_only_where_it_is_wanted(room: Stillroom) -> None:
    """`session.permanent = False` in a before_request begins no session and sends no cookie."""
    for wanted in (False, True):
        app = make_app(room)

        @app.before_request
        def remember(wanted: bool = wanted) -> None:
            flask.session.permanent = wanted

        browser = Jar(app)
        browser.get("/me")
        assert (browser.cookie is not None) == wanted


def test_the_lifetime_of_a_permanent_session_is_flasks(room: Stillroom) -> None:
    """A permanent session ends after PERMANENT_SESSION_LIFETIME without a request, where that is set."""
    for lifetime in (datetime.timedelta(hours=1), datetime.timedelta(days=30), LONGEST):
        browser = Jar(make_app(room, PERMANENT_SESSION_LIFETIME=lifetime))
        browser.get("/permanent/1")
        found = room.sessions.get(browser.token or "")
        assert found is not None
        seconds = min(lifetime.total_seconds(), 366 * 86_400)  # no session is longer
        assert round(found.expires_at - found.last_seen) == seconds
        assert round(found.ends_by - found.created) == max(seconds, 604_800)
        browser.get("/permanent/0")
        found = room.sessions.get(browser.token or "")
        assert found is not None
        assert round(found.expires_at - found.last_seen) == 86_400


def test_another_lifetime_takes_along_what_another_request_has_just_added(room: Stillroom) -> None:
    """A session that becomes permanent has what another request put into it while this one was under way."""
    app = make_app(room, PERMANENT_SESSION_LIFETIME=3_600)
    browser = Jar(app)

    @app.get("/late")
    def late() -> str:
        flask.session.permanent = True
        room.sessions.update(browser.token or "", {"b": "2"})
        return "late"

    browser.get("/set/a/1")
    browser.get("/late")
    assert browser.get("/shown").json == {"_permanent": "True", "a": "1", "b": "2"}


@pytest.mark.parametrize(
    ("wanted", "refreshes", "lives_on"), [(1, True, True), (1, False, False), (0, False, True)]
)
def test_a_look_keeps_alive_what_flask_says(
    room: Stillroom, client: Any, wanted: int, refreshes: bool, lives_on: bool
) -> None:
    """With SESSION_REFRESH_EACH_REQUEST=False a permanent session lives on from its last change, not
    its last look.
    """
    browser = Jar(make_app(room, SESSION_REFRESH_EACH_REQUEST=refreshes))
    browser.get(f"/permanent/{wanted}")
    found = room.sessions.get(browser.token or "", touch=False)
    assert found is not None
    age(client, room, found.handle, 50_000)
    browser.get("/shown")
    assert browser.cookie is None
    age(client, room, found.handle, 50_000)
    assert (browser.get("/shown").json != {}) == lives_on
    if lives_on:
        browser.get("/set/a/1")
        age(client, room, found.handle, 50_000)
        assert browser.get("/shown").json["a"] == "1"


# Values and keys


def test_values_keep_their_type(room: Stillroom) -> None:
    """Values keep their type as in Flask's own session, in the next request and beside the app."""
    app = make_app(room)
    got: dict[str, Any] = {}
    put(app, "/put", lambda: flask.session.update(VALUES) or "put")
    put(app, "/get", lambda: got.update(flask.session) or "got")
    browser = Jar(app)
    browser.get("/put")
    browser.get("/get")
    assert got == VALUES
    assert [type(got[key]) for key in VALUES] == [type(value) for value in VALUES.values()]
    found = room.sessions.get(browser.token or "")
    assert found is not None
    assert found.data == VALUES


def test_a_list_within_a_tuple_may_change_in_place(room: Stillroom) -> None:
    """A list within a tuple, a set and a value within a dict may change in place without `modified`."""
    app = make_app(room)

    @app.get("/put")
    def put() -> str:
        flask.session.update(pair=(1, [2]), seen={1}, deep={"a": [{"b": ()}]})
        return "put"

    @app.get("/change")
    def change() -> str:
        flask.session["pair"][1].append(3)
        flask.session["seen"].add(2)
        flask.session["deep"]["a"][0]["b"] += (1,)
        return "changed"

    browser = Jar(app)
    browser.get("/put")
    browser.get("/change")
    found = room.sessions.get(browser.token or "")
    assert found is not None
    assert found.data == {"pair": (1, [2, 3]), "seen": {1, 2}, "deep": {"a": [{"b": (1,)}]}}


def test_flashes_are_shown_as_they_were_meant(room: Stillroom) -> None:
    """Markup in a flash stays markup after the redirect, and a text is escaped."""
    app = make_app(room)
    app.add_url_rule(
        "/flash",
        view_func=lambda: flask.flash(Markup("press <b>play</b>")) or flask.flash("<i>") or "ok",
    )
    page = "{% for m in get_flashed_messages() %}{{ m }}{% endfor %}"
    put(app, "/show", lambda: flask.render_template_string(page))
    browser = Jar(app)
    browser.get("/flash")
    assert browser.get("/show").text == "press <b>play</b>&lt;i&gt;"
    assert browser.get("/show").text == ""


def test_it_is_a_dict_to_who_writes_so(room: Stillroom) -> None:
    """The session takes `|=`, `|` and `copy` as a dict does, and a user that is set this way is logged in."""
    app = make_app(room, PLAIN)

    @app.get("/joined")
    def joined() -> Any:
        flask.session |= {"a": 1, "_user_id": "ann"}
        return {**(flask.session | {"b": 2}), "copied": flask.session.copy() == {**flask.session}}

    with app.test_client() as browser:
        shown = browser.get("/joined").get_json()
        assert shown == {"a": 1, "b": 2, "_user_id": "ann", "copied": True}
        assert browser.get("/me").get_json() == {"user": "ann"}


@pytest.mark.parametrize(
    "asked",
    [
        lambda session: {"a": 0, "b": 1} | session,
        lambda session: {"b": 1} | copy.deepcopy(session),
        lambda session: {"b": 1} | copy.copy(session),
        lambda session: dict.fromkeys(reversed(session), 2) | {"b": 1},
    ],
    ids=["|", "deepcopy", "copy", "reversed"],
)
def test_each_face_s_session_is_asked_as_a_dict_is(
    room: Stillroom, asked: Callable[[Any], dict[str, Any]]
) -> None:
    """What a dict can do besides, a request's session can too: in Flask, and around any app."""
    app = make_app(room, PLAIN)
    told: list[dict[str, Any]] = []

    @app.get("/asked")
    def view() -> str:
        flask.session["a"] = 2
        told.append(asked(flask.session))
        return ""

    def bare(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["stillroom.session"]["a"] = 2
        told.append(asked(environ["stillroom.session"]))
        start_response("200 OK", [])
        return [b""]

    app.test_client().get("/asked")
    Client(StillroomMiddleware(bare, room)).get("/")
    assert told == [{"a": 2, "b": 1}] * 2


@pytest.mark.parametrize(
    "key", ["/a/path?x=1", "\u0438\u043c\u044f" * 40, "_state_" + "x" * 300, "a b", "", "\n", "x.y"]
)
def test_any_text_is_a_key(room: Stillroom, key: str) -> None:
    """Any text is a key, long or in any alphabet."""
    app = make_app(room)
    put(app, "/put", lambda: flask.session.update({key: [1]}) or "put")
    put(app, "/add", lambda: flask.session[key].append(2) or "added")
    put(app, "/drop", lambda: str(flask.session.pop(key)))
    browser = Jar(app)
    for path in ("/put", "/add"):
        assert browser.get(path).status_code == 200
    assert browser.get("/shown").json == {key: "[1, 2]"}
    assert browser.get("/drop").text == "[1, 2]"
    assert browser.get("/shown").json == {}


def test_a_number_is_a_key_as_in_flask(room: Stillroom) -> None:
    """A number as a key becomes text, as in Flask's JSON."""
    ours, theirs = make_app(room), flask.Flask("theirs")
    theirs.secret_key = "x"
    for app in (ours, theirs):
        app.add_url_rule(
            "/put", view_func=lambda: flask.session.update({7: {8: "x"}}) or str(flask.session[7])
        )
        put(app, "/look", lambda: str(dict(flask.session)))
        client = app.test_client()
        assert client.get("/put", base_url="https://localhost").text == "{8: 'x'}"
        assert client.get("/look", base_url="https://localhost").text == "{'7': {'8': 'x'}}"


# What Flask's session says of itself


def test_clear_is_a_logout(room: Stillroom) -> None:
    """clear ends the session and the cookie; data that is set afterwards begins another, anonymous session."""
    browser = Jar(make_app(room))
    browser.get("/login/ann")
    before = browser.token
    browser.get("/clear")
    assert (browser.token, room.sessions.count("ann")) == (None, 0)
    browser.token = before
    assert browser.get("/me").json == {"user": None}
    browser.get("/login/ann")
    before = browser.token
    app = make_app(room)
    app.add_url_rule(
        "/again", view_func=lambda: flask.session.clear() or flask.session.update(a=1) or "ok"
    )
    other = Jar(app)
    other.token = before
    other.get("/again")
    assert other.token not in (before, None)
    assert other.get("/me").json == {"user": None}
    assert room.sessions.get(before or "") is None


def test_modified_and_accessed_are_true_to_flask(room: Stillroom) -> None:
    """`modified` and `accessed` are what Flask says, and `modified` may be set."""
    app = make_app(room)
    with app.test_request_context() as context:
        inner: Any = context._session
        assert (inner.accessed, inner.modified) == (False, False)
        assert "a" not in flask.session
        assert (inner.accessed, inner.modified) == (True, False)
        flask.session["a"] = [1]
        assert inner.modified
        assert inner.new
        inner.modified = True


def test_a_test_may_look_after_the_response(room: Stillroom) -> None:
    """A test may read the session and flashes after the response; a change there is not stored."""
    app = make_app(room, PLAIN)
    app.add_url_rule(
        "/", view_func=lambda: flask.flash("saved") or flask.session.update(a=1) or "ok"
    )
    with app.test_client() as client:
        client.get("/")
        assert flask.get_flashed_messages() == ["saved"]
        assert flask.session["a"] == 1
        flask.session["b"] = 2
        client.get("/me")
        assert "b" not in flask.session


# Flask-WTF


def test_a_csrf_token_does_not_outlive_a_login(room: Stillroom) -> None:
    """A CSRF token known before a login, also from a planted session, is not valid after it."""
    app = make_app(room)
    CSRFProtect(app)
    put(app, "/form", generate_csrf)
    put(app, "/pay", lambda: "paid", methods=["POST"])

    @app.get("/login-page/<user>")
    def page(user: str) -> str:
        generate_csrf()  # a form that is shown before
        flask.session.login(user)  # type: ignore[attr-defined]
        return generate_csrf()

    browser = Jar(app, Referer="https://localhost/")
    planted = browser.get("/form").text
    fresh_one = browser.get("/login-page/ann").text
    assert browser.get("/pay", "POST", data={"csrf_token": planted}).status_code == 400
    assert browser.get("/pay", "POST", data={"csrf_token": fresh_one}).text == "paid"


def test_what_must_not_outlive_a_login_is_a_setting(make_room: Callable[..., Stillroom]) -> None:
    """`session_login_drops` and the name given to Flask-WTF say which keys a login drops."""
    app = make_app(make_room(session_login_drops="step, wizard"), WTF_CSRF_FIELD_NAME="mine")
    browser = Jar(app)
    for key in ("step", "wizard", "mine", "cart"):
        browser.get(f"/set/{key}/1")
    browser.get("/login/ann")
    assert browser.get("/shown").json == {"cart": "1"}


# Flask-Login


class User(UserMixin):  # type: ignore[misc]
    def __init__(self, id: str) -> None:
        self.id = id


def login_app(room: Stillroom, **config: Any) -> flask.Flask:
    app = make_app(room, **config)
    manager = LoginManager(app)
    manager.user_loader(User)

    @app.get("/in/<user>")
    def log_in(user: str) -> str:
        login_user(User(user), remember="remember" in flask.request.args)
        return user

    @app.get("/out")
    def log_out() -> str:
        logout_user()
        return "out"

    @app.get("/who")
    def who() -> str:
        return current_user.id if current_user.is_authenticated else "nobody"

    @app.get("/again")
    def again() -> str:
        confirm_login()
        return "confirmed"

    put(app, "/theirs", fresh_login_required(lambda: "fresh"))
    put(app, "/ours", fresh(600)(lambda: "fresh"))
    return app


def test_flask_logins_user_is_the_sessions_user(room: Stillroom) -> None:
    """Flask-Login's user is the session's user, in the list of devices and under a new token."""
    browser = Jar(login_app(room))
    browser.get("/set/cart/tea")
    planted = browser.token
    browser.get("/in/ann")
    assert browser.token != planted
    assert room.sessions.get(planted or "") is None
    assert [device.user_id for device in room.sessions.list_for_user("ann")] == ["ann"]
    assert browser.get("/who").text == "ann"
    assert browser.get("/shown").json["cart"] == "tea"
    room.sessions.destroy_for_user("ann")
    assert browser.get("/who").text == "nobody"


def test_flask_logins_logout_is_a_logout(room: Stillroom) -> None:
    """Flask-Login's logout leaves an anonymous session with the rest of the data, under a new token,
    or none at all.
    """
    for cart in (True, False):
        browser = Jar(login_app(room))
        browser.get("/in/ann")
        if cart:
            browser.get("/set/cart/tea")
        before = browser.token
        browser.get("/out")
        assert browser.get("/who").text == "nobody"
        assert (browser.token is not None) == cart
        assert browser.token != before
        assert room.sessions.count("ann") == 0
        browser.token = before
        assert browser.get("/who").text == "nobody"


def test_another_user_does_not_inherit_the_session(room: Stillroom) -> None:
    """login_user() over another user's session takes along only what this request has set."""
    browser = Jar(login_app(room))
    browser.get("/in/ann")
    browser.get("/set/cart/tea")
    browser.get("/in/bob")
    assert browser.get("/who").text == "bob"
    assert "cart" not in browser.get("/shown").json
    assert (room.sessions.count("ann"), room.sessions.count("bob")) == (0, 1)


CHANGES: dict[str, Callable[[str | None], object]] = {
    "set": lambda user: flask.session.__setitem__("_user_id", user),
    "update": lambda user: flask.session.update(_user_id=user),
    "changed in place": lambda user: flask.session.mutate(lambda data: data.update(_user_id=user)),  # type: ignore[attr-defined]
    "another dict": lambda user: flask.session.mutate(lambda data: {**data, "_user_id": user}),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize(
    ("before", "user"), [(None, "ann"), ("ann", None), ("bob", "ann"), ("ann", "ann")]
)
def test_a_change_of_flask_logins_user_is_a_login_or_a_logout(
    how: str, before: str | None, user: str | None, room: Stillroom
) -> None:
    """Whoever changes Flask-Login's user logs in or out, by whatever a session can do, under a new token."""
    app = login_app(room)

    @app.get("/change")
    def change() -> str:
        flask.session["set"] = "now"
        CHANGES[how](user)
        return "changed"

    browser = Jar(app)
    browser.get("/set/cart/tea")
    if before:
        browser.get(f"/in/{before}")
    planted = browser.token
    assert browser.get("/change").status_code == 200
    assert browser.get("/who").text == (user or "nobody")
    assert {name: room.sessions.count(name) for name in ("ann", "bob")} == {
        "ann": int(user == "ann"),
        "bob": 0,
    }
    shown = browser.get("/shown").json
    assert shown["set"] == "now"
    assert ("cart" in shown) == (before != "bob")
    if how in ("set", "update") or user != before:  # to set the same user is a login
        assert browser.token != planted
        assert room.sessions.get(planted or "") is None


def test_a_login_of_the_session_goes_before_flask_logins(room: Stillroom) -> None:
    """A login on the session wins over Flask-Login's in one request, in either order."""
    app = login_app(room)

    @app.get("/both/<int:first>")
    def both(first: int) -> str:
        acts = [lambda: flask.session.login("customer-7"), lambda: login_user(User("ann"))]  # type: ignore[attr-defined]
        for act in acts if first else reversed(acts):
            act()
        return "in"

    for first in (0, 1):
        browser = Jar(app)
        browser.get("/set/cart/tea")
        browser.get(f"/both/{first}")
        assert browser.get("/who").text == "ann"
        assert browser.get("/shown").json["cart"] == "tea"
        assert room.sessions.destroy_for_user("customer-7") == 1
        assert room.sessions.count("ann") == 0


def test_strong_protection_logs_a_stolen_cookie_out(room: Stillroom) -> None:
    """With strong protection another User-Agent with a stolen cookie is logged out, and so is the
    stolen session.
    """
    app = login_app(room, SESSION_PROTECTION="strong")
    hers, thief = Jar(app, **{"User-Agent": "hers"}), Jar(app, **{"User-Agent": "the thief's"})
    hers.get("/in/ann")
    assert hers.get("/who").text == "ann"
    thief.token = hers.token
    assert thief.get("/who").text == "nobody"
    assert room.sessions.count("ann") == 0
    assert hers.get("/who").text == "nobody"


def test_who_is_only_remembered_is_not_fresh(room: Stillroom, client: Any) -> None:
    """Flask-Login's remember cookie begins a session in the list of devices, and a sensitive page asks
    for a login.
    """
    app = login_app(room)
    first = Jar(app)
    reply = first.get("/in/ann?remember=1")
    (kept,) = [
        line for line in reply.headers.getlist("Set-Cookie") if line.startswith("remember_token=")
    ]
    assert [first.get(path).status_code for path in ("/theirs", "/ours")] == [200, 200]
    again = Jar(app, Cookie=kept.partition(";")[0])
    assert again.get("/who").text == "ann"
    assert again.token not in (None, first.token)
    assert room.sessions.count("ann") == 2
    assert [again.get(path).status_code for path in ("/theirs", "/ours")] == [401, 401]
    before = again.token
    again.get("/again")
    assert again.token not in (None, before)
    assert [again.get(path).status_code for path in ("/theirs", "/ours")] == [200, 200]
    found = room.sessions.get(again.token or "")
    assert found is not None
    age(client, room, found.handle, 601)
    client.hincrby(
        room.keys.sessions(int(found.handle[:2], 16), [found.handle[3:].encode()])[0],
        "_a",
        -601_000_000,
    )
    assert again.get("/ours").status_code == 401


def test_a_view_that_is_awaited_asks_again_too(room: Stillroom) -> None:
    """`@fresh` is for async views as well, and for those of a class."""
    app = make_app(room, PLAIN)

    @app.get("/pay")
    @fresh(600)
    async def pay() -> str:
        return "paid"

    class Account(MethodView):
        decorators: ClassVar[list[Any]] = [fresh(600)]

        async def get(self) -> str:
            return "changed"

    app.add_url_rule("/account", view_func=Account.as_view("account"))
    browser = Jar(app, PLAIN.name)
    assert [browser.get(path).status_code for path in ("/pay", "/account")] == [401, 401]
    browser.get("/login/ann")
    assert [browser.get(path).text for path in ("/pay", "/account")] == ["paid", "changed"]


def test_a_fresh_that_the_app_does_not_know_is_told(
    room: Stillroom, caplog: pytest.LogCaptureFixture
) -> None:
    """A @fresh above @app.get asks nobody, so it is named with the first request, once."""
    app = make_app(room, PLAIN)
    fresh(600)(app.get("/lost", endpoint="lost")(lambda: "open"))
    app.get("/kept", endpoint="kept")(fresh(600)(lambda: "kept"))
    browser = Jar(app)
    answered = [browser.get(path).status_code for path in ("/lost", "/kept", "/lost")]
    assert answered == [200, 401, 200]
    (told,) = [one.getMessage() for one in caplog.records if "asks nobody" in one.message]
    assert "the view lost has a @fresh that the app does not know" in told


# One round trip


def test_flasks_session_is_read_along_with_the_limits(room: Stillroom, client: Any) -> None:
    """Flask's session is read in one batch with the limits where the route's last request used it."""
    from stillroom import DEFAULT, Routes
    from tests.support.monitor import ON_ITS_WAY, READS_SESSION, sent

    app = make_app(room, SESSION_COOKIE_NAME="__Host-mine")
    put(app, "/plain", lambda: "plain")
    routes = Routes([], default=[DEFAULT])
    app.wsgi_app = StillroomMiddleware(app.wsgi_app, room, sessions=False, routes=routes)  # type: ignore[method-assign]
    token = room.sessions.create("ann", {"a": 1}).token
    batches: list[int] = []
    execute = room.state_wire.execute

    def counted(batch: Any, *given: Any, **named: Any) -> Any:
        batches.append(len(batch))
        return execute(batch, *given, **named)

    with serving_wsgi(app) as port:
        given = {"Cookie": f"__Host-mine={token}"}

        def get(path: str) -> Reply:
            return ask(port, path, headers=given)

        for _ in range(2):
            assert get("/me").text == '{"user":"ann"}\n'
        room.state_stats.due = float("inf")
        room.state_wire.execute = counted  # type: ignore[method-assign]
        assert sent(client, lambda: get("/me"), but=ON_ITS_WAY) == ["EVALSHA", *READS_SESSION]
        assert batches == [4]
        get("/plain")  # looks not, so the next one is not read ahead
        batches.clear()
        get("/plain")
        assert batches == [1]


def test_an_event_of_a_socket_sees_the_session_of_now(room: Stillroom) -> None:
    """Flask-SocketIO opens a session for each event, with the environ of the handshake: an event sees a logout that
    came after the handshake, whose session was read along with its limits."""
    from stillroom import DEFAULT, Routes

    app = make_app(room)
    environs: list[Any] = []

    @app.get("/handshake")
    def handshake() -> dict[str, Any]:
        environs.append(flask.request.environ)
        return dict(flask.session)

    token = room.sessions.create("ann", {"a": 1}).token
    given = {"Cookie": f"__Host-sid={token}"}
    table = Routes([], default=[DEFAULT])
    client = Client(StillroomMiddleware(app, room, sessions=False, routes=table), use_cookies=False)
    for _ in range(2):  # the second one reads it along
        assert client.get("/handshake", headers=given).json == {"a": 1}
    room.sessions.destroy(token)
    with app.request_context(environs[-1]):
        assert dict(flask.session) == {}
