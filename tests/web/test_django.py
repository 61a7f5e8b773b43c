"""Django works on the room: sessions with a user index, a cache without pickle, and 503 while Redis is away."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import datetime
import decimal
import http
import io
import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.base import UpdateError
from django.core.cache import caches
from django.core.cache.backends.base import BaseCache
from django.core.handlers.wsgi import WSGIHandler
from django.http import (
    FileResponse,
    HttpRequest,
    HttpResponse,
    JsonResponse,
    StreamingHttpResponse,
)
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path
from django.utils import timezone
from django.utils.decorators import method_decorator
from django.utils.safestring import SafeString, mark_safe
from django.utils.translation import gettext_lazy
from django.views import View
from django.views.decorators.cache import cache_page
from django.views.decorators.clickjacking import xframe_options_exempt
from pydantic import RedisDsn

from stillroom import (
    DEFAULT,
    Limit,
    LoadShed,
    RedisUnavailable,
    Routes,
    SessionDataRefused,
    SettingsError,
    Stillroom,
    ValueTooLarge,
)
from stillroom.codec import Unencodable
from stillroom.web.django import room as room_of_django
from stillroom.web.django.limits import LimitsMiddleware, limited
from stillroom.web.django.middleware import SessionMiddleware
from stillroom.web.django.sessions import SessionStore
from stillroom.web.django.views import fresh
from stillroom.web.wsgi import StillroomMiddleware
from tests.support.crowd import PATIENT
from tests.support.django_project import configure
from tests.support.sessions import age, break_records
from tests.support.web import COOKIE, Browser, serving_wsgi

configure()


def cart(request: HttpRequest) -> JsonResponse:
    return JsonResponse(request.session.get("cart", []), safe=False)


def add(request: HttpRequest, item: str) -> JsonResponse:
    request.session["cart"] = [*request.session.get("cart", []), item]
    return cart(request)


def login(request: HttpRequest, who: str) -> HttpResponse:
    """Change a session as django.contrib.auth.login does."""
    request.session.cycle_key()
    request.session[SESSION_KEY] = who
    return HttpResponse(who)


def logout(request: HttpRequest) -> HttpResponse:
    request.session.flush()
    return HttpResponse("bye")


def plain(request: HttpRequest) -> HttpResponse:
    return HttpResponse("plain")


def public(request: HttpRequest, item: str) -> HttpResponse:
    response = add(request, item)
    response["Cache-Control"] = "public, max-age=600, s-maxage=600"
    return response


def deleted(request: HttpRequest) -> HttpResponse:
    request.session.delete()
    request.session["cart"] = ["jam"]
    return HttpResponse("deleted")


def over(request: HttpRequest) -> HttpResponse:
    request.session["cart"] = []
    request.session.set_expiry(-1)
    return HttpResponse("over")


@limited(Limit("django_by_user", 3, 60, by="user"))
def by_user(request: HttpRequest) -> HttpResponse:
    return HttpResponse("counted")


def confirm(request: HttpRequest) -> HttpResponse:
    request.session.confirm()
    return HttpResponse("confirmed")


@fresh(600)
def sensitive(request: HttpRequest) -> HttpResponse:
    return HttpResponse("open")


@fresh(600)
async def asensitive(request: HttpRequest) -> HttpResponse:
    return HttpResponse("open")


@method_decorator(fresh(600), name="dispatch")
class Sensitive(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("open")


class SensitiveMethods(View):
    @fresh(600)
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("open")


calls: list[str] = []


@cache_page(60)
def page(request: HttpRequest) -> HttpResponse:
    calls.append(request.path)
    return HttpResponse("\u00e9".encode("latin-1"), content_type="text/plain; charset=latin-1")


urlpatterns = [
    path("cart", cart),
    path("cart/add/<item>", add),
    path("public/add/<item>", public),
    path("deleted", deleted),
    path("over", over),
    path("by_user", by_user),
    path("looks", plain),
    path("looks_late", plain),
    path("confirm", confirm),
    path("sensitive", sensitive),
    path("asensitive", asensitive),
    path("csensitive", Sensitive.as_view()),
    path("msensitive", SensitiveMethods.as_view()),
    path("login/<who>", login),
    path("logout", logout),
    path("plain", plain),
    path("page", page),
]


@pytest.fixture
def stillroom_setting(settings: Any) -> dict[str, Any]:
    return PATIENT | {"redis_url": settings.redis_url, "namespace": "shop"}


@pytest.fixture
def room(stillroom_setting: dict[str, Any]) -> Iterator[Stillroom]:
    """Return the room that Django uses."""
    with override_settings(STILLROOM=stillroom_setting):
        room = room_of_django()
        yield room
        room.close()


@pytest.fixture
def away() -> Iterator[None]:
    """Make Redis unreachable."""
    with override_settings(
        STILLROOM={"redis_url": "redis://127.0.0.1:1", "session_peppers": "p" * 40}
    ):
        yield
        room_of_django().close()


@pytest.fixture
def cache(room: Stillroom) -> BaseCache:
    return caches["default"]


@pytest.fixture
def browser(room: Stillroom) -> Iterator[Browser]:
    with serving_wsgi(WSGIHandler()) as port:
        yield Browser(port)


# Sessions


def test_the_user_of_a_session_is_in_the_index(browser: Browser, room: Stillroom) -> None:
    """A login changes the token and keeps the cart. The user's sessions can be listed, and ended from elsewhere."""
    browser.get("/cart/add/tea")
    before = browser.token
    browser.get("/login/7")
    assert browser.token != before
    assert room.sessions.get(before or "") is None
    assert [device.user_id for device in room.sessions.list_for_user("7")] == ["7"]
    assert browser.get("/cart").text == '["tea"]'
    room.sessions.destroy_for_user("7")
    assert browser.get("/cart").text == "[]"


def test_a_logout_leaves_nothing(browser: Browser, room: Stillroom) -> None:
    """flush ends the session, and Django's middleware forgets the cookie."""
    browser.get("/login/7")
    browser.get("/logout")
    assert browser.token is None
    assert room.sessions.count("7") == 0


@pytest.mark.parametrize("field", ["cart", "_v", "_c"])
@pytest.mark.parametrize("path", ["/cart", "/cart/add/jam", "/login/7", "/logout"])
def test_a_session_that_can_not_be_read_is_taken_for_an_ended_one(
    browser: Browser, client: Any, path: str, field: str
) -> None:
    """A visitor whose record is broken goes on without it, as if it had ended."""
    browser.get("/cart/add/tea")
    old = browser.token
    break_records(client, field)
    assert browser.get(path).status == 200
    assert browser.token != old
    assert browser.get("/cart").text == ('["jam"]' if "jam" in path else "[]")


def test_a_request_that_does_not_look_reads_nothing(away: None) -> None:
    """A request that does not use the session is served while Redis is away; one that reads or writes gets 503."""
    with serving_wsgi(WSGIHandler()) as port:
        token = "00." + "A" * 43
        assert Browser(port, token).get("/plain").status == 200
        for known, where in ((token, "/cart"), (None, "/cart/add/tea"), (token, "/login/7")):
            reply = Browser(port, known).get(where)
            assert (reply.status, reply.one("retry-after")) == (503, "2")
            assert (reply.one("content-type"), reply.token) == ("application/problem+json", None)


class Looks:
    """A middleware that looks at the session in front of the view, as Django's LoginRequiredMiddleware does."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path == "/looks":
            request.session.get("a")
        return self._get_response(request)

    def process_view(self, request: HttpRequest, *_: Any) -> None:
        if request.path == "/looks_late":
            request.session.get("a")


class WithPages:
    """URLs with error pages whose layout shows who is logged in."""

    urlpatterns = urlpatterns

    @staticmethod
    def handler404(request: HttpRequest, exception: Exception) -> HttpResponse:
        return HttpResponse(request.session.get("user"), status=404)

    @staticmethod
    def handler500(request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.session.get("user"), status=500)


@pytest.mark.parametrize(
    ("path_", "urls"),
    [
        ("/looks", __name__),
        ("/looks_late", __name__),
        ("/by_user", __name__),
        ("/looks", WithPages()),
        ("/nothing", WithPages()),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_whatever_looks_gets_a_503(away: None, path_: str, urls: Any, is_async: bool) -> None:
    """A middleware, a limit by user or an error page that looks while Redis is away is answered with 503, too."""
    ours = "stillroom.web.django"
    middleware = [f"{ours}.middleware.SessionMiddleware", f"{ours}.limits.LimitsMiddleware"]
    kind = AsyncClient if is_async else Client
    with override_settings(MIDDLEWARE=[*middleware, f"{__name__}.Looks"], ROOT_URLCONF=urls):
        client: Any = kind(raise_request_exception=False)
        client.cookies[COOKIE] = "00." + "A" * 43
        reply = asyncio.run(client.get(path_)) if is_async else client.get(path_)
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "2")
    assert not reply.cookies


def test_only_what_changed_is_written(room: Stillroom) -> None:
    """Two requests on one session write only their own changes and keep each other's."""
    first = SessionStore()
    first["a"] = first["both"] = 1
    first.save()
    one, two = SessionStore(first.session_key), SessionStore(first.session_key)
    one["a"], two["b"] = 2, [3]
    del one["both"]
    one.save()
    two.save()
    found = room.sessions.get(first.session_key)
    assert found is not None
    assert found.data == {"a": 2, "b": [3]}


def test_a_session_emptied_without_a_look_is_empty(room: Stillroom) -> None:
    """clear() does not read the session, and save() removes its old data all the same."""
    first = SessionStore()
    first["a"] = 1
    first.save()
    other = SessionStore(first.session_key)
    other.clear()
    other["b"] = 2
    other.save()
    assert SessionStore(first.session_key).load() == {"b": 2}


def test_an_ended_session_is_not_brought_back(room: Stillroom) -> None:
    """A change to an ended session raises UpdateError, of which Django's middleware makes a 400."""

    def log_in(session: SessionStore) -> None:
        session[SESSION_KEY] = "7"
        session.save()

    def set_expiry(session: SessionStore) -> None:
        session.set_expiry(100)
        session.save()

    for act in (SessionStore.save, SessionStore.cycle_key, log_in, set_expiry):
        first = SessionStore()
        first["a"] = 1
        first.save()
        late = SessionStore(first.session_key)
        late["b"] = 2
        first.delete()
        with pytest.raises(UpdateError):
            act(late)
        assert not late.exists(first.session_key)
    assert room.sessions.count() == 0


def test_an_expiry_of_its_own_is_the_servers_too(room: Stillroom, client: Any) -> None:
    """set_expiry on a living session gives it another key, and Redis ends it in time."""
    session = SessionStore()
    session["a"] = 1
    session.save()
    before = session.session_key
    session.set_expiry(100)
    session.save()
    assert session.session_key != before
    found = room.sessions.get(session.session_key)
    assert found is not None
    assert round(found.expires_at - found.last_seen) == 100
    age(client, room, found.handle, 101)
    assert SessionStore(session.session_key).load() == {}


def at_moment(session: SessionStore) -> None:
    session.set_expiry(timezone.now() + datetime.timedelta(hours=1))


def after_time(session: SessionStore) -> None:
    session.set_expiry(datetime.timedelta(hours=1))


@pytest.mark.parametrize("expire", [at_moment, after_time])
def test_a_session_ends_at_its_moment_however_often_it_is_used(
    room: Stillroom, monkeypatch: pytest.MonkeyPatch, expire: Callable[[SessionStore], None]
) -> None:
    """A session with a moment as its expiry ends then, though it was used a moment ago, and is ended in Redis."""
    session = SessionStore()
    session["a"] = 1
    expire(session)
    session.save()
    key, now = session.session_key, time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3_590)
    assert SessionStore(key)["a"] == 1
    monkeypatch.setattr(time, "time", lambda: now + 3_601)
    late = SessionStore(key)
    assert "a" not in late
    assert late.session_key is None
    assert room.sessions.get(key) is None


def test_a_moment_that_is_put_off_makes_no_new_session(room: Stillroom) -> None:
    """Requests at the same time may each put off the moment at which their session ends, and all keep their key."""
    session = SessionStore()
    session["a"] = 1
    after_time(session)
    session.save()
    one, other = SessionStore(session.session_key), SessionStore(session.session_key)
    for number, store in enumerate((one, other)):
        store[f"of {number}"] = True
        after_time(store)
    one.save()
    other.save()
    assert {one.session_key, other.session_key} == {session.session_key}
    found = SessionStore(session.session_key)
    assert {"a", "of 0", "of 1"} < set(found.keys())
    assert datetime.datetime.fromisoformat(
        found["_session_expiry"]
    ) > datetime.datetime.fromisoformat(session["_session_expiry"])


def test_a_moment_further_away_than_redis_keeps_the_session_begins_a_new_one(
    room: Stillroom,
) -> None:
    """A session is kept up to its moment also where that is put off by more than it was to live."""
    session = SessionStore()
    session["a"] = 1
    after_time(session)
    session.save()
    session.set_expiry(datetime.timedelta(days=2))
    session.save()
    found = room.sessions.get(session.session_key)
    assert found is not None
    assert found.expires_at - found.last_seen >= 2 * 86_400 - 1


@pytest.mark.parametrize("age", [731 * 86_400, datetime.timedelta(days=3_650)])
def test_a_lifetime_of_years_is_as_long_as_a_session_may_live(
    room: Stillroom, age: int | datetime.timedelta
) -> None:
    """SESSION_COOKIE_AGE and set_expiry of many years are no error: a session ends at its absolute end anyway."""
    session = SessionStore()
    session["a"] = 1
    session.set_expiry(age)
    session.save()
    found = room.sessions.get(session.session_key)
    assert found is not None
    assert found.expires_at == found.ends_by
    with override_settings(SESSION_COOKIE_AGE=3_650 * 86_400):
        other = SessionStore()
        other["a"] = 1
        other.save()
        assert SessionStore(other.session_key).load() == {"a": 1}


def test_create_keeps_what_the_request_has_put_into_the_session(room: Stillroom) -> None:
    """`create()` for a visitor without a session keeps what the request has put into it, as Django's own does."""
    session = SessionStore()
    session["cart"] = ["tea"]
    session.create()
    session["more"] = 1
    session.save()
    assert SessionStore(session.session_key).load() == {"cart": ["tea"], "more": 1}


@pytest.mark.parametrize("begin", [SessionStore.save, SessionStore.create])
def test_an_empty_session_that_a_view_begins_is_the_visitor_s(
    room: Stillroom, begin: Callable[[SessionStore], None]
) -> None:
    """A view that saves an empty session, for its key to name a cart, finds the same key in the next request."""
    noted: list[str] = []

    def view(request: HttpRequest) -> HttpResponse:
        if not request.session.session_key:
            begin(request.session)
        noted.append(request.session.session_key)
        return HttpResponse()

    for _ in range(2):
        request = RequestFactory().get("/")
        request.COOKIES |= {COOKIE: noted[0]} if noted else {}
        response = SessionMiddleware(view)(request)
        assert len(noted) > 1 or response.cookies[COOKIE].value == noted[0]
    assert noted == [noted[0]] * 2


@pytest.mark.parametrize("begun", [False, True])
def test_who_asks_for_the_key_after_a_login_gets_the_new_one(room: Stillroom, begun: bool) -> None:
    """Who notes the key of a login, to end that session later, notes the one that the browser gets."""
    noted: list[str] = []

    def view(request: HttpRequest) -> HttpResponse:
        request.session["cart"] = ["tea"]
        log_in(request.session)
        noted.append(request.session.session_key)  # as a handler of user_logged_in does
        request.session["later"] = True
        return HttpResponse()

    request = RequestFactory().get("/")
    if begun:
        first = SessionStore()
        first["cart"] = []
        first.save()
        request.COOKIES[COOKIE] = first.session_key
    response = SessionMiddleware(view)(request)
    assert noted == [response.cookies[COOKIE].value]
    assert {"cart", "later", SESSION_KEY} == set(SessionStore(noted[0]).keys())
    SessionStore().delete(noted[0])
    assert room.sessions.count("7") == 0


@pytest.mark.parametrize("remember", [False, True])
def test_a_remember_box_leaves_the_key_that_was_noted(room: Stillroom, remember: bool) -> None:
    """A login form says after the login how long the cookie stays; who noted the key at the login can end it."""
    noted: list[str] = []

    def view(request: HttpRequest) -> HttpResponse:
        log_in(request.session)
        noted.append(request.session.session_key)
        request.session.set_expiry(request.session.get_session_cookie_age() if remember else 0)
        return HttpResponse()

    response = SessionMiddleware(view)(RequestFactory().get("/"))
    assert noted == [response.cookies[COOKIE].value]
    assert bool(response.cookies[COOKIE]["max-age"]) is remember
    assert SessionStore().exists(noted[0])


def test_a_session_that_is_flushed_has_no_key(room: Stillroom) -> None:
    """Who asks for the key after a login that was taken back in the same request gets none, and begins nothing."""
    noted: list[Any] = []

    def view(request: HttpRequest) -> HttpResponse:
        log_in(request.session)
        request.session.flush()
        noted.append(request.session.session_key)
        return HttpResponse()

    response = SessionMiddleware(view)(RequestFactory().get("/"))
    assert noted == [None]
    assert room.sessions.count() == 0
    assert COOKIE not in response.cookies


def test_an_expiry_in_the_past_is_a_logout(browser: Browser, room: Stillroom) -> None:
    """A session whose expiry is over has ended, and the browser is told to forget its cookie, as Django does."""
    browser.get("/cart/add/tea")
    reply = browser.get("/over")
    assert "Max-Age=-1" in (reply.one("set-cookie") or "")
    assert reply.one("cache-control") == "private"
    assert room.sessions.count() == 0


def test_data_after_delete_begins_a_session(browser: Browser) -> None:
    """A view that deletes its visitor's session, and then puts something into it, begins another one."""
    browser.get("/cart/add/tea")
    before = browser.token
    assert browser.get("/deleted").status == 200
    assert browser.token not in (before, None)
    assert browser.get("/cart").text == '["jam"]'


def test_the_methods_for_async_views(room: Stillroom) -> None:
    """The async methods do the same, also those that Django's base class writes in two steps."""

    async def story() -> None:
        session = SessionStore()
        await session.aset("a", 1)
        await session.asave()
        before = session.session_key
        await session.acycle_key()
        assert session.session_key != before
        again = SessionStore(session.session_key)
        assert await again.aget("a") == 1
        assert await again.aexists(before) is False
        await again.aflush()
        assert await again.aexists(session.session_key) is False
        await SessionStore.aclear_expired()

    asyncio.run(story())


def log_in(session: SessionStore, **more: Any) -> None:
    """Log in within a request as django.contrib.auth.login does."""
    session.is_in_request = True
    session.cycle_key()
    session[SESSION_KEY] = "7"
    session.update(more)


@pytest.mark.parametrize(
    "more",
    [{"a": "y" * 70_000}, {"a": object()}, {(1, 2): 3}, {f"k{n}": n for n in range(100)}],
    ids=["too large", "an object", "a key", "too many"],
)
@pytest.mark.parametrize("expires", [False, True])
def test_a_login_that_is_refused_leaves_the_visitor_what_he_had(
    room: Stillroom, more: dict[Any, Any], expires: bool
) -> None:
    """A refused login leaves the visitor's cart under the key that the browser has."""
    first = SessionStore()
    first["cart"] = ["tea"]
    first.save()
    late = SessionStore(first.session_key)
    if expires:
        late.set_expiry(100)
        late.update(more)
    else:
        log_in(late, **{str(key): value for key, value in more.items()} if "k1" in more else {})
        late.update(more)
    with pytest.raises((SessionDataRefused, ValueTooLarge)):
        late.save()
    assert SessionStore(first.session_key).load() == {"cart": ["tea"]}
    assert room.sessions.count() == 1


def test_a_login_in_a_request_is_one_new_key(room: Stillroom) -> None:
    """A login in a request makes one new key with the visitor's data; the earlier key opens nothing."""
    first = SessionStore()
    first["cart"] = ["tea"]
    first.save()
    late = SessionStore(first.session_key)
    log_in(late)
    assert SessionStore(first.session_key).load() == {
        "cart": ["tea"]
    }  # until it is known whether all can be written
    late.save()
    assert late.session_key != first.session_key
    assert SessionStore(first.session_key).load() == {}
    assert [device.user_id for device in room.sessions.list_for_user("7")] == ["7"]
    assert SessionStore(late.session_key).load() == {"cart": ["tea"], SESSION_KEY: "7"}


@pytest.mark.parametrize("logs_in", [True, False], ids=["login", "set_expiry"])
def test_a_new_session_takes_along_what_another_request_has_just_added(
    room: Stillroom, logs_in: bool
) -> None:
    """What another request puts into the cart while this one looks at a password goes along, also after a save."""
    first = SessionStore()
    first["cart"] = ["tea"]
    first.save()
    late, other = (SessionStore(first.session_key) for _ in range(2))
    late["cart"].append("jam")
    other["cart"].append("milk")
    other["seen"] = 1
    other.save()
    if logs_in:
        log_in(late)
    else:
        late.set_expiry(100)
    late.save()
    own = {SESSION_KEY: "7"} if logs_in else {"_session_expiry": 100}
    whole = {"cart": ["tea", "milk", "jam"], "seen": 1, **own}
    assert dict(late.items()) == SessionStore(late.session_key).load() == whole
    late["more"] = 2
    late.save()
    assert SessionStore(late.session_key).load() == {**whole, "more": 2}


@pytest.mark.parametrize("empties", [SessionStore.clear, SessionStore.flush])
def test_a_login_after_all_was_dropped_takes_nothing_along(
    room: Stillroom, empties: Callable[[SessionStore], None]
) -> None:
    """A session that is emptied and then logged in has nothing of another request's either."""
    first = SessionStore()
    first["cart"] = ["tea"]
    first.save()
    late, other = (SessionStore(first.session_key) for _ in range(2))
    assert late["cart"] == ["tea"]
    other["seen"] = 1
    other.save()
    empties(late)
    log_in(late)
    late.save()
    assert SessionStore(late.session_key).load() == {SESSION_KEY: "7"}


@pytest.mark.parametrize(
    "key", ["/a/path?x=1", "\u0438\u043c\u044f" * 40, "_state_" + "x" * 300, "", "a b"]
)
def test_any_text_is_a_key(room: Stillroom, key: str) -> None:
    """Long keys and keys in any alphabet can be written, changed and removed."""
    session = SessionStore()
    session[key] = [1]
    session.save()
    other = SessionStore(session.session_key)
    other[key].append(2)
    other.save()
    assert SessionStore(session.session_key).load() == {key: [1, 2]}
    del other[key]
    other.save()
    assert SessionStore(session.session_key).load() == {}


def test_a_number_is_a_key_as_in_django(room: Stillroom) -> None:
    """A number as a key becomes text, as in Django's JSON."""
    session = SessionStore()
    session[7] = session[None] = {8: "x"}
    session.save()
    assert session[7] == {8: "x"}
    assert SessionStore(session.session_key).load() == {"7": {"8": "x"}, "null": {"8": "x"}}
    session[7] = 9
    session.save()
    assert SessionStore(session.session_key).load()["7"] == 9


def test_values_keep_their_type(room: Stillroom) -> None:
    """Values keep their type, also most of those that Django's JSON refuses."""
    values = {
        str(n): value
        for n, value in enumerate(KEPT)
        if not (isinstance(value, dict) and 1 in value)
    }
    session = SessionStore()
    session.update(values)
    session.save()
    assert SessionStore(session.session_key).load() == values


def test_two_requests_append_to_one_list(room: Stillroom) -> None:
    """Two requests append to one list and change other keys, and every change is kept."""
    first = SessionStore()
    first["cart"] = ["tea"]
    first.save()
    one, two = SessionStore(first.session_key), SessionStore(first.session_key)
    one["cart"].append("jam")
    two["cart"] = [*two["cart"], "rye"]
    two["seen"] = True
    for session in (one, two):
        session.save()
    assert SessionStore(first.session_key).load() == {"cart": ["tea", "jam", "rye"], "seen": True}
    two["cart"].append("oat")
    two.save()
    assert SessionStore(first.session_key)["cart"] == ["tea", "jam", "rye", "oat"]


# Its cookie


def test_the_cookie_goes_out_once_and_is_private(browser: Browser, room: Stillroom) -> None:
    """The cookie is sent once, for the session's absolute life.

    A change sends none that could replace a login's.
    """
    reply = browser.get("/public/add/tea")
    assert "Max-Age=604800;" in str(reply.one("set-cookie"))
    assert reply.one("cache-control") == "private, max-age=600"
    assert reply.one("vary") == "Cookie"
    reply = browser.get("/public/add/jam")
    assert reply.all("set-cookie") == []
    assert reply.one("cache-control") == "public, max-age=600, s-maxage=600"
    assert browser.get("/plain").all("vary") == []


def test_a_cookie_that_opens_nothing_is_forgotten_but_for_a_login(
    browser: Browser, room: Stillroom
) -> None:
    """A cookie that opens nothing is forgotten, except after a login elsewhere; a session begun over
    it gets 400.
    """
    browser.get("/cart/add/tea")
    ended = browser.token or ""
    room.sessions.destroy(ended)
    assert Browser(browser.port, ended).get("/cart").token == ""
    browser.get("/login/7")
    late = Browser(browser.port, ended)
    assert late.get("/cart").token is None
    reply = late.get("/cart/add/jam")
    assert (reply.status, reply.token) == (400, None)
    assert browser.get("/logout").token == ""
    assert Browser(browser.port, ended).get("/logout").token is None


def test_a_sensitive_view_asks_again(browser: Browser, room: Stillroom, client: Any) -> None:
    """A sensitive view answers 401 without a recent login; after `confirm` it opens, under a new key."""
    for path_ in ("/sensitive", "/asensitive", "/csensitive", "/msensitive"):
        assert browser.get(path_).status == 401
        browser.get("/login/7")
        assert browser.get(path_).status == 200
        found = room.sessions.get(browser.token or "")
        assert found is not None
        age(client, room, found.handle, 601)
        assert browser.get(path_).status == 401
        before = browser.token
        browser.get("/confirm")
        assert browser.token not in (before, None)
        assert browser.get(path_).status == 200
        browser.get("/logout")


def test_another_lifetime_is_no_proof(room: Stillroom) -> None:
    """set_expiry begins a new session, and an old login in it is still no fresh proof."""
    session = SessionStore()
    session[SESSION_KEY] = "7"
    session.save()
    assert SessionStore(session.session_key).is_fresh(600)
    session.set_expiry(100)
    session.save()
    assert not SessionStore(session.session_key).is_fresh(600)


def test_the_session_is_read_along_with_the_limits(room: Stillroom, client: Any) -> None:
    """The session is read in one batch with the limits where the route's last request used it."""
    routes = Routes([], default=[DEFAULT])
    app = StillroomMiddleware(WSGIHandler(), room, sessions=False, routes=routes)
    batches: list[int] = []
    execute = room.state_wire.execute

    def counted(batch: Any, *given: Any, **named: Any) -> Any:
        batches.append(len(batch))
        return execute(batch, *given, **named)

    with serving_wsgi(app) as port:
        browser = Browser(port)
        browser.get("/cart/add/tea")
        browser.get("/cart")
        room.state_stats.due = float("inf")
        room.state_wire.execute = counted  # type: ignore[method-assign]
        try:
            assert browser.get("/cart").text == '["tea"]'
        finally:
            room.state_wire.execute = execute  # type: ignore[method-assign]
    assert batches == [4]


# The cache

KEPT = [
    None,
    1.5,
    "text",
    mark_safe("<b>"),
    b"\x00\xff",
    (1, ("a", [2])),
    {1: "one", (2, 3): None},
    {"!": "not a kind", "v": 1},
    {"deep": [{"when": datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC)}]},
    {1, 2},
    frozenset({"a"}),
    datetime.date(2026, 1, 2),
    datetime.time(1, 2),
    datetime.timedelta(days=-1, microseconds=1),
    decimal.Decimal("1.10"),
    uuid.UUID(int=7),
]


@pytest.mark.parametrize("value", KEPT, ids=repr)
def test_what_json_has_no_word_for_comes_back_as_it_was(cache: BaseCache, value: Any) -> None:
    """A value that JSON cannot write comes back with its type, from each way of reading."""
    cache.set("k", value)
    assert cache.get("k") == value
    assert type(cache.get("k")) is type(value)
    assert cache.get_many(["k"]) == {"k": value}
    assert isinstance(cache.get("k"), SafeString) == isinstance(value, SafeString)


def test_what_could_only_be_pickled_is_refused(cache: BaseCache) -> None:
    """A value that only pickle could store is refused at the call with the alternatives, and nothing is stored."""
    with pytest.raises(Unencodable, match="object: the cache keeps JSON, tuple, set"):
        cache.set("k", [object()])
    assert cache.get("k") is None


class Place(NamedTuple):
    """A named tuple as Wagtail keeps one of a site."""

    site: int
    path: str


class Moment(datetime.datetime):
    """A datetime subclass as libraries for times have them."""


@pytest.mark.parametrize("kind", [SessionMiddleware, LimitsMiddleware])
def test_a_load_that_is_shed_is_a_503_that_says_when_to_come_again(kind: Any) -> None:
    """A shed load that a view does not handle is a 503 with Retry-After; other errors are left to Django."""
    middleware = kind(lambda _: HttpResponse())
    request = RequestFactory().get("/")
    answer = middleware.process_exception(request, LoadShed("prices", 20, 1.5))
    assert answer is not None
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert middleware.process_exception(request, ValueError()) is None


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (Place(1, "/"), "tuple"),
        ([Place(1, "/")], "tuple"),
        (collections.OrderedDict(a=1), "dict"),
        (collections.Counter("aab"), "dict"),
        (collections.defaultdict(list), "dict"),
        (Moment(2026, 1, 1), "datetime"),
        (http.HTTPStatus.OK, "int"),
        (type("Text", (str,), {})("x"), "str"),
        ({"a": type("Many", (list,), {})()}, "list"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_would_come_back_as_its_base_is_refused(
    cache: BaseCache, value: Any, base: str
) -> None:
    """A value that would come back as its base type is refused; a JSON cache with tuples has broken an admin."""
    with pytest.raises(Unencodable, match=f"it would come back as {base}; make it one"):
        cache.set("k", value)
    assert cache.get("k") is None


def test_a_time_of_a_zone_without_a_date_is_refused(cache: BaseCache) -> None:
    """A time of a zone whose offset depends on the date is refused, because it would come back without the zone."""
    with pytest.raises(Unencodable, match="time: it would lose its zone"):
        cache.set("k", [datetime.time(9, 30, tzinfo=ZoneInfo("Europe/Berlin"))])
    assert cache.get("k") is None


def test_whole_pages_are_kept(browser: Browser, cache: BaseCache) -> None:
    """cache_page keeps status, headers and bytes of a response as they were."""
    calls.clear()
    first, second = browser.get("/page"), browser.get("/page")
    assert len(calls) == 1
    assert (second.status, second.body) == (200, "\u00e9".encode("latin-1"))
    assert second.one("content-type") == first.one("content-type")


def test_a_whole_page_keeps_what_decorators_tell_middlewares(cache: BaseCache) -> None:
    """A kept response has its marks: what may frame it, and its own policy, as Django 6 and django-csp note it."""
    response: Any = xframe_options_exempt(lambda _: HttpResponse("x"))(HttpRequest())
    response._csp_config = {
        "script-src": ["'self'", gettext_lazy("b")],
        "img-src": {"a"},
        "x": None,
    }
    cache.set("k", response)
    found: Any = cache.get("k")
    assert found.xframe_options_exempt is True
    assert found._csp_config == {"script-src": ["'self'", "b"], "img-src": ["a"], "x": None}
    assert not hasattr(found, "_csp_exempt")


def test_the_async_methods_of_the_cache_do_the_same(cache: BaseCache, room: Stillroom) -> None:
    """No task's `aincr` is lost, it leaves the timeout as it was, and what `aset_many` stores carries its tags."""
    tagged: Any = cache

    async def story() -> None:
        await tagged.aset_many({"n": 0, "a": 1, "b": 2}, 60, tags=["products"])
        await asyncio.gather(*[cache.aincr("n") for _ in range(10)])
        assert await cache.adecr("n", 3) == 7
        assert await cache.aget_many(["n", "a", "x"]) == {"n": 7, "a": 1}
        await cache.adelete_many(["a", "x"])
        assert await cache.ahas_key("a") is False
        with pytest.raises(ValueError, match="not found"):
            await cache.aincr("a")

    asyncio.run(story())
    found = room.upkeep.explain("django:default::1:n")
    assert found.tags == ("products",)
    assert 0 < (found.ends_at or 0) - time.time() <= 60
    room.cache.invalidate_by_tag("products")
    assert cache.get_many(["n", "b"]) == {}


@pytest.mark.parametrize(
    "key", ["q" * 1_100, "é" * 600, "%" * 400, "\ud800"], ids=["long", "accents", "percent", "half"]
)
@pytest.mark.filterwarnings("ignore::django.core.cache.CacheKeyWarning")
def test_whatever_a_visitor_searches_for_may_be_in_a_key(cache: BaseCache, key: str) -> None:
    """A key that is too long for Redis, or no UTF-8, is a key as any other, and none that is like it."""
    assert cache.get_or_set(key, lambda: 1) == 1
    cache.set_many({key + "x": 2, "plain": 3})
    assert cache.get_many([key, key + "x", "plain"]) == {key: 1, key + "x": 2, "plain": 3}
    assert cache.incr(key) == 2
    assert cache.add(key, 9) is False
    assert cache.touch(key, 30)
    assert cache.delete(key)
    assert cache.get(key + "x") == 2
    cache.clear()
    assert cache.get(key + "x") is None


def test_a_default_that_is_not_needed_is_not_made(cache: BaseCache) -> None:
    """`get_or_set` makes its default where nothing is there, also with a timeout that keeps nothing."""
    cache.set("k", None)
    assert cache.get_or_set("k", pytest.fail, 0) is None
    assert cache.get_or_set("other", lambda: 3, 0) == 3
    assert cache.get("other") is None


def test_clear_empties_this_location_alone(cache: BaseCache, room: Stillroom) -> None:
    """cache.clear empties one LOCATION and leaves other locations and the app's own room."""
    names = ("default", "o*her", "o*her:pages")
    with override_settings(
        CACHES={
            name: {"BACKEND": "stillroom.web.django.cache.StillroomCache", "LOCATION": name}
            for name in names
        }
    ):
        room.cache.set("mine", 1)
        for name in names:
            caches[name].set("k", name)
        caches["o*her"].clear()
        assert caches["default"].get("k") == "default"
        assert caches["o*her:pages"].get("k") == "o*her:pages"
        assert caches["o*her"].get("k") is None
        assert room.cache.get("mine") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"LOCATION": "redis://:secret@redis:6379/1"}, "is a name, not the URL of Redis"),
        ({"LOCATION": ["redis://:secret@redis:6379/1"]}, "give the URL as REDIS_URL"),
        ({"OPTIONS": {"CLIENT_CLASS": "django_redis.client"}}, "no option 'CLIENT_CLASS'"),
    ],
)
def test_the_settings_of_another_backend_are_refused(given: dict[str, Any], said: str) -> None:
    """A URL as LOCATION would be a part of each key, and Redis would be looked for elsewhere; so it is refused."""
    backend = {"BACKEND": "stillroom.web.django.cache.StillroomCache", **given}
    with (
        override_settings(CACHES={"default": backend}),
        pytest.raises(SettingsError, match=said) as refused,
    ):
        caches["default"].get("k")
    assert "secret" not in str(refused.value)


def test_the_cache_goes_without_redis(away: None) -> None:
    """When Redis is away a page is made anew, and only a call that needs a promise raises."""
    cache = caches["default"]
    cache.set("k", 1)
    assert cache.get("k", "default") == "default"
    assert cache.get_many(["k"]) == {}
    assert cache.set_many({"k": 1}) == ["k"]
    assert cache.add("k", 1) is False
    assert cache.touch("k") is False
    assert cache.delete("k") is False
    assert cache.get_or_set("k", lambda: 7) == 7
    for promise in (cache.clear, lambda: cache.incr("k")):
        with pytest.raises(RedisUnavailable):
            promise()


# The room


def test_the_room_is_the_apps_own_if_its_path_is_given(settings: Any) -> None:
    """The room may be given by its path. Another object at the path is refused with a sentence."""
    with override_settings(STILLROOM=f"{__name__}:mine"):
        assert room_of_django() is mine
    with override_settings(STILLROOM=f"{__name__}.calls"):
        with pytest.raises(SettingsError, match="is a list, not a Stillroom"):
            room_of_django()
    for wrong in (
        "redis://:canary@redis",
        RedisDsn("redis://:canary@redis"),
        ["redis://:canary@redis"],
        7,
    ):
        with override_settings(STILLROOM=wrong):
            with pytest.raises(SettingsError, match="the path of a room, or a dict") as refused:
                room_of_django()
            assert "canary" not in str(refused.value)


mine = Stillroom()


def test_json_is_what_redis_holds(cache: BaseCache, room: Stillroom, client: Any) -> None:
    """Redis holds JSON, readable in redis-cli."""
    cache.set("k", (1, b"x"))
    raw = client.get(room.keys.entry(b"django:default::1:k"))
    assert json.loads(raw.partition(b"\n")[2]) == {
        "!": "tuple",
        "v": [1, {"!": "bytes", "v": "eA=="}],
    }


@pytest.mark.parametrize("how", ["propagated", "exits", "stream", "cancelled", "replaced"])
def test_a_place_is_given_back_where_django_does_not_end_its_request(
    room: Stillroom, how: str
) -> None:
    """A request gives its place back without a response, where its stream raises and where another is sent."""
    place = Limit("django_place", 1, 600, in_flight=True)
    raised = {"exits": SystemExit, "cancelled": asyncio.CancelledError}.get(how, RuntimeError)

    def failing() -> Iterator[bytes]:
        yield b"a"
        raise RuntimeError

    def view(request: HttpRequest) -> StreamingHttpResponse:
        if how in ("propagated", "exits"):
            raise raised
        return StreamingHttpResponse(failing())

    async def async_view(request: HttpRequest) -> HttpResponse:
        raise asyncio.CancelledError

    request = RequestFactory().get("/")
    with contextlib.suppress(RuntimeError, SystemExit, asyncio.CancelledError):
        if how == "cancelled":
            asyncio.run(LimitsMiddleware(limited(place)(async_view)).__acall__(request))
        response = LimitsMiddleware(limited(place)(view))(request)
        assert room.limits.peek("127.0.0.1", [place]).remaining == 0
        request.close() if how == "replaced" else list(response)
    assert room.limits.peek("127.0.0.1", [place]).remaining == 1


def test_a_file_whose_client_has_it_all_has_given_its_place_back(room: Stillroom) -> None:
    """A file gives its place back before its last piece is sent. The server closes it after that."""
    place = Limit("django_file", 1, 600, in_flight=True)
    view = limited(place)(lambda request: FileResponse(io.BytesIO(b"all"), as_attachment=True))
    response = LimitsMiddleware(view)(RequestFactory().get("/"))
    assert room.limits.peek("127.0.0.1", [place]).remaining == 0
    assert next(iter(response)) == b"all"
    assert room.limits.peek("127.0.0.1", [place]).remaining == 1
    response.close()


def test_tasks_of_one_request_share_its_session(room: Stillroom) -> None:
    """Tasks of one request that look at its session together all keep what they put there."""
    made = SessionStore()
    made["begun"] = True
    made.save()
    store = SessionStore(made.session_key)

    async def change() -> None:
        await asyncio.gather(*[store.aset(f"part{n}", n) for n in range(8)])
        await store.asave()

    asyncio.run(change())
    assert len(SessionStore(made.session_key).keys()) == 9
