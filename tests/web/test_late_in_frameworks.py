"""Two requests of one browser through Flask and Django keep, in every order, what either did to the cookie."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import flask
import pytest
from django.contrib.auth import SESSION_KEY
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path
from flask_login import LoginManager, UserMixin, login_user, logout_user

import tests.web.test_django  # noqa: F401 - configures Django
from stillroom import Settings, Stillroom
from stillroom.web.django import room as room_of_django
from stillroom.web.fields import to_fields
from stillroom.web.flask import StillroomSessions
from tests.support.crowd import PATIENT
from tests.support.web import WITHIN

ORDERS = ["aabb", "abab", "abba", "baab", "baba", "bbaa"]  # each looks, then answers
IN_SHORT = ["abba", "baba"]  # both have looked; the other orders are tested without a framework
PAUSE = "tests.pause"
COOKIE = "__Host-sid"


class Pause:
    """The point at which a view stops between its look and its act."""

    def __init__(self) -> None:
        self.has_looked = threading.Event()
        self.goes_on = threading.Event()

    def here(self) -> None:
        self.has_looked.set()
        assert self.goes_on.wait(WITHIN)


# What a view may do


class User(UserMixin):
    def __init__(self, id: str) -> None:
        self.id = id


def _permanent(session: Any) -> None:
    session.permanent = True


def _count(session: Any) -> None:
    session.mutate(lambda data: data.update(n=data.get("n", 0) + 1))


def _count_for_longer(session: Any) -> None:
    _count(session)
    session.permanent = True


def _empty_for_longer(session: Any) -> None:
    session.pop("cart", None)
    session.permanent = True


def _log_out_and_say(session: Any) -> None:
    logout_user()
    flask.flash("bye")


def _clear_and_set(session: Any) -> None:
    session.clear()
    session["user"] = "ann"


def _log_in(session: Any) -> None:
    """Log in as django.contrib.auth does."""
    session.cycle_key()
    session[SESSION_KEY] = "ann"


def _flush_and_set(session: Any) -> None:
    session.flush()
    session["user"] = "ann"


FLASKS: dict[str, Callable[[Any], object]] = {
    "look": lambda session: None,
    "set": lambda session: session.update(theme="dark"),
    "add": lambda session: session.setdefault("cart", []).append("tea"),
    "empty": lambda session: session.pop("cart", None),
    "permanent": _permanent,
    "login": lambda session: session.login("ann"),
    "login_user": lambda session: login_user(User("ann")),
    "logout_user": lambda session: logout_user(),
    "renew": lambda session: session.renew(),
    "logout": lambda session: session.logout(),
    "clear": lambda session: session.clear(),
    "logout_user and flash": _log_out_and_say,
    "clear and set": _clear_and_set,
}
DJANGOS: dict[str, Callable[[Any], object]] = {
    "look": lambda session: None,
    "set": lambda session: session.update({"theme": "dark"}),
    "add": lambda session: session.setdefault("cart", []).append("tea"),
    "empty": lambda session: session.pop("cart", None),
    "expiry": lambda session: session.set_expiry(600),
    "login": _log_in,
    "renew": lambda session: session.cycle_key(),
    "confirm": lambda session: session.confirm(),
    "logout": lambda session: session.flush(),
    "clear": lambda session: session.clear(),
    "flush and set": _flush_and_set,
}
LOGINS = ("login", "login_user")
LOGOUTS = ("logout", "logout_user", "logout_user and flash")
ENDS = (*LOGOUTS, "clear", "clear and set", "flush and set", "empty")


def flask_app(room: Stillroom, **config: Any) -> Any:
    app = flask.Flask("late")
    app.config.update(config)
    app.secret_key = "of no use outside this test"
    app.session_interface = StillroomSessions(room)
    LoginManager(app).user_loader(User)

    @app.get("/<act>")
    def view(act: str) -> str:
        flask.session.get("cart")
        flask.request.environ[PAUSE].here()
        FLASKS[act](flask.session)
        return act

    return app


def django_view(request: Any, act: str) -> HttpResponse:
    request.session.get("cart")
    request.environ[PAUSE].here()
    DJANGOS[act](request.session)
    return HttpResponse(act)


urlpatterns = [path("<act>", django_view)]


@pytest.fixture
def django_app(settings: Settings) -> Iterator[Any]:
    given = PATIENT | {"redis_url": settings.redis_url, "request_timeout": 30}
    middleware = ["stillroom.web.django.middleware.SessionMiddleware"]
    with override_settings(
        STILLROOM=given,
        MIDDLEWARE=middleware,
        ROOT_URLCONF=__name__,
        SESSION_ENGINE="stillroom.web.django.sessions",
        SESSION_COOKIE_NAME=COOKIE,
        SESSION_COOKIE_SECURE=True,
    ):
        yield WSGIHandler()
        room_of_django().close()


class Asked:
    """One request that reads the session, then acts and answers."""

    def __init__(self, app: Any, act: str, token: str | None) -> None:
        self._app = app
        self.act = act
        self._token = token
        self._pause = Pause()
        self._thread = threading.Thread(target=self._ask)
        self.status = 0
        self.set_cookie: str | None = None  # '' if it is to be forgotten

    def step(self) -> bool:
        """Take the next step; return whether it was the answer."""
        if self._thread.ident is None:
            self._thread.start()
            assert self._pause.has_looked.wait(WITHIN)
            return False
        self._pause.goes_on.set()
        self._thread.join(WITHIN)
        return True

    def _ask(self) -> None:
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": f"/{self.act}",
            "SCRIPT_NAME": "",
            "QUERY_STRING": "",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "443",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "192.0.2.1",
            "HTTP_HOST": "localhost",
            "wsgi.url_scheme": "https",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
            PAUSE: self._pause,
        }
        if self._token:
            environ["HTTP_COOKIE"] = f"{COOKIE}={self._token}"
        body = self._app(environ, self._start)
        b"".join(body)
        if hasattr(body, "close"):
            body.close()

    def _start(self, status: str, headers: list[tuple[str, str]], *_: Any) -> None:
        self.status = int(status[:3])
        for name, value in headers:
            if name == "Set-Cookie" and value.strip().startswith(f"{COOKIE}="):
                self.set_cookie = value.partition("=")[2].partition(";")[0].strip('"')


def browsed(
    app: Any, token: str | None, acts: tuple[str, str], order: str
) -> tuple[Asked, Asked, str | None]:
    """Run the two requests; return them and the token that the browser has afterwards."""
    requests = {"a": Asked(app, acts[0], token), "b": Asked(app, acts[1], token)}
    for name in order:
        one = requests[name]
        if one.step() and one.set_cookie is not None:
            token = one.set_cookie or None
    return requests["a"], requests["b"], token


FLASK = {"flask": {}, "flask with a lifetime": {"PERMANENT_SESSION_LIFETIME": 600}}


@pytest.fixture(params=[*FLASK, "django"])
def app(request: pytest.FixtureRequest, room: Stillroom) -> Any:
    if request.param in FLASK:
        return flask_app(room, **FLASK[request.param])
    return request.getfixturevalue("django_app")


@pytest.mark.long
@pytest.mark.parametrize("begins", ["anonymous", "logged in", "ended"])
def test_a_late_response_undoes_nothing(
    app: Any, begins: str, room: Stillroom, is_full: bool
) -> None:
    """Whatever the other request does that is no login itself: the browser keeps what the login, the new token or
    the logout gave it, or what was done to that afterwards."""
    acts = FLASKS if isinstance(app, flask.Flask) else DJANGOS
    decides = [act for act in acts if begins == "ended" or act not in ("look", "set", "add")]
    for order, first, second in product(ORDERS if is_full else IN_SHORT, acts, decides):
        start = begun(room, acts, begins)
        one, two, token = browsed(app, start, (first, second), order)
        story = f"{order}: {first} and {second}: {one.status}, {two.status}"
        assert {one.status, two.status} <= {200, 400, 409}, story
        is_alive = token is not None and room.sessions.get(token) is not None
        assert is_alive or token in (None, start), story
        if is_decided(one, two, begins):
            came_last = order.rindex("b") > order.rindex("a")
            ended = not two.set_cookie or room.sessions.get(two.set_cookie) is None
            is_the_others = first in ENDS and token == (one.set_cookie or None) and ended
            assert token == (two.set_cookie or None) or (is_the_others and not came_last), story
        else:
            assert is_alive or token in (None, start), story


def test_a_logout_ends_what_others_renewed(app: Any, room: Stillroom) -> None:
    """After a logout nobody is logged in without a new login, whichever of the two requests answers first."""
    acts = FLASKS if isinstance(app, flask.Flask) else DJANGOS
    logouts = [act for act in acts if act in LOGOUTS]
    others = ["look", "set", "add", "renew", *logouts]
    for order, first, second in product(ORDERS[1:-1], others, logouts):  # both have looked before
        start = begun(room, acts, "logged in")
        one, two, _ = browsed(app, start, (first, second), order)
        story = f"{order}: {first} and {second}: {one.status}, {two.status}"
        assert two.status == 200, story
        assert one.status == 200 or first not in logouts, story
        assert room.sessions.list_for_user("ann") == [], story


def test_two_logins_at_once_both_succeed(app: Any, room: Stillroom) -> None:
    """When a login button is clicked twice, both succeed and the browser has the last token."""
    acts = FLASKS if isinstance(app, flask.Flask) else DJANGOS
    for begins, order in product(["anonymous", "logged in", "ended"], ORDERS):
        for act in [act for act in acts if act in LOGINS]:
            start = begun(room, acts, begins)
            one, two, token = browsed(app, start, (act, act), order)
            story = f"{begins}, {order}: {one.status}, {two.status}"
            assert (one.status, two.status) == (200, 200), story
            found = room.sessions.get(token or "")
            assert found is not None, story
            assert found.user_id == "ann", story


def test_two_lifetimes_at_once_both_succeed(app: Any, room: Stillroom) -> None:
    """When two requests at once set a session's lifetime, both succeed and the browser has the living token."""
    act = "permanent" if isinstance(app, flask.Flask) else "expiry"
    for begins, order in product(["anonymous", "logged in"], ORDERS):
        start = begun(room, FLASKS if act in FLASKS else DJANGOS, begins)
        one, two, token = browsed(app, start, (act, act), order)
        story = f"{begins}, {order}: {one.status}, {two.status}"
        assert (one.status, two.status) == (200, 200), story
        assert room.sessions.get(token or "") is not None, story


@pytest.mark.parametrize("config", FLASK.values(), ids=FLASK)
def test_a_refused_lifetime_hides_no_other_change(
    config: dict[str, Any], room: Stillroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that sets a lifetime, and whose other changes are refused, is answered as a conflict."""
    monkeypatch.setitem(FLASKS, "count", _count_for_longer)
    monkeypatch.setitem(FLASKS, "empty", _empty_for_longer)
    for order, act in product(ORDERS[1:-1], ["count", "empty"]):
        start = begun(room, FLASKS, "logged in")
        _, two, token = browsed(flask_app(room, **config), start, ("permanent", act), order)
        found = room.sessions.get(token or "")
        assert found is not None, order
        is_done = "n" in found.data if act == "count" else "cart" not in found.data
        assert is_done or two.status != 200, f"{order}: {act}"


def test_a_refused_mutate_is_a_conflict(room: Stillroom, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request does to an ended session by `mutate` is done, or it is told that a login was first."""
    monkeypatch.setitem(FLASKS, "count", _count)
    start = begun(room, FLASKS, "ended")
    _, two, token = browsed(flask_app(room), start, ("login", "count"), "abab")
    found = room.sessions.get(token or "")
    assert found is not None
    assert "n" in found.data or two.status == 409


def begun(room: Stillroom, acts: object, begins: str) -> str:
    """Return the token of a session with a cart to begin with."""
    user = "ann" if begins == "logged in" else None
    data: dict[str, Any] = {"cart": ["rye"]}
    if user:
        data[SESSION_KEY if acts is DJANGOS else "_user_id"] = "ann"
    start = room.sessions.create(user, to_fields(data, data)).token
    assert start is not None
    if begins == "ended":
        room.sessions.destroy(start)
    return start


def is_decided(one: Asked, two: Asked, begins: str) -> bool:
    """Return whether the second request has decided about the cookie, so that the first must leave it."""
    if two.set_cookie is None or one.act in LOGINS:
        return False
    if begins == "ended" and two.act not in LOGINS:
        return bool(two.set_cookie) and not one.set_cookie  # two that begin a session are alike
    return True
