"""Endpoints have limits in each framework, by its own routing and on real HTTP."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from werkzeug.serving import make_server
from werkzeug.test import EnvironBuilder

import redis
from stillroom import (
    DEFAULT,
    AsyncStillroom,
    InvalidLimit,
    Limit,
    NoDispatch,
    Route,
    Routes,
    Settings,
    SettingsError,
    Stillroom,
)
from stillroom.sessions.token import make_token
from stillroom.web import Header, Refusal
from stillroom.web.known_routes import known_routes
from stillroom.web.limited import carried, is_exempt
from stillroom.web.starlette_limits import exempt
from stillroom.web.wsgi import StillroomMiddleware as WsgiMiddleware
from tests.support.celery_process import until
from tests.support.monitor import ON_ITS_WAY, sent
from tests.support.threads import at_once
from tests.support.web import WITHIN, Browser, Reply, ask, serving_asgi
from tests.web.limited_apps import FRAMEWORKS, GATE, ONE, ORIGIN, PLACE, serving
from tests.web.test_limits import read

FROM_SPA = {"Origin": ORIGIN}
PREFLIGHT = FROM_SPA | {"Access-Control-Request-Method": "POST"}


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def settings(server: Any, settings: Settings) -> Settings:
    return settings.model_copy(update={"trusted_proxies": ("127.0.0.0/8",)})


@pytest.fixture
def port(framework: str, settings: Settings) -> Iterator[int]:
    with serving(framework, settings) as port:
        yield port


def statuses(
    port: int, path: str, times: int, method: str = "GET", headers: Mapping[str, str] = {}
) -> list[int]:
    return [ask(port, path, method, headers).status for _ in range(times)]


def by(address: str) -> dict[str, str]:
    """Return the header with which the trusted proxy names a client."""
    return {"X-Forwarded-For": address}


# What counts


def test_only_failures_count(port: int) -> None:
    """Only failures count: the tenth right login is admitted, the sixth wrong one is not, nor is a
    right one after it.
    """
    assert statuses(port, "/guess?right=1", 10, "POST") == [200] * 10
    assert statuses(port, "/guess", 7, "POST") == [401] * 5 + [429] * 2
    assert statuses(port, "/guess?right=1", 1, "POST") == [429]


def test_what_counts_may_be_said_by_a_function_of_the_answer(port: int) -> None:
    """A function of the answer may say what counts: a form shown again, with 200, was wrong; a
    redirect was right.
    """
    assert statuses(port, "/form?right=1", 7, "POST") == [302] * 7
    assert statuses(port, "/form", 7, "POST") == [200] * 5 + [429] * 2


@pytest.mark.parametrize("setting", ["limit_exempt", "abuse_allow"])
def test_a_client_that_no_limit_counts_may_fail(
    framework: str, settings: Settings, setting: str
) -> None:
    """A client in an exempt network gets its answers from endpoints that count failures, or what is in flight."""
    stream = "/async-stream" if framework == "django-asgi" else "/stream"
    GATE.set()
    with serving(framework, settings.model_copy(update={setting: ("127.0.0.0/8",)})) as port:
        assert statuses(port, "/guess?right=1", 2, "POST") == [200] * 2
        assert statuses(port, "/guess", 7, "POST") == [401] * 7
        assert statuses(port, "/form", 7, "POST") == [200] * 7
        assert statuses(port, stream, 2) == [200] * 2


def test_parallel_guesses_are_no_more_than_the_quota(port: int) -> None:
    """Parallel guesses are no more than the quota, because each is charged before and refunded for a
    right answer.
    """
    with ThreadPoolExecutor(20) as pool:
        got = list(pool.map(lambda _: ask(port, "/guess", "POST").status, range(60)))
    assert got.count(401) == 5
    assert got.count(429) == 55


def test_a_limit_may_be_a_function_of_the_request(port: int) -> None:
    """A limit may be a function of the request: a gold client has more."""
    assert statuses(port, "/tiers", 2) == [200, 429]
    assert statuses(port, "/tiers", 4, headers={"X-Tier": "gold"}) == [200] * 3 + [429]


def test_a_cost_may_be_a_function_of_the_request(port: int) -> None:
    """A cost may be a function of the request: after 4 and 4 of 10 a cost of 3 does not fit and 2 does."""
    got = [ask(port, f"/cost?n={n}").status for n in (4, 4, 3, 2, 1)]
    assert got == [200, 200, 429, 200, 429]


# By whom


def test_a_session_user_is_counted_wherever_he_comes_from(port: int) -> None:
    """A session's user is counted at every address.

    A visitor without a name counts by address, not with all others.
    """
    ann, bob = Browser(port), Browser(port)
    ann.get("/login?who=ann")
    bob.get("/login?who=bob")
    got = [ann.get("/mine", headers=by(f"203.0.113.{n}")).status for n in range(3)]
    assert got == [200, 200, 429]
    assert [bob.get("/mine").status for _ in range(3)] == [200, 200, 429]
    for address in ("203.0.113.50", "203.0.113.51"):
        assert statuses(port, "/mine", 3, headers=by(address)) == [200, 200, 429]


@pytest.mark.parametrize(("path", "header"), [("/keyed", "X-API-Key"), ("/tenant", "X-Tenant")])
def test_a_header_or_a_function_says_whom_to_count(port: int, path: str, header: str) -> None:
    """A header or a function may name the subject wherever the request comes from; without it the
    address counts.
    """
    named = [by(f"203.0.113.{n}") | {header: "a"} for n in range(3)]
    assert [ask(port, path, headers=one).status for one in named] == [200, 200, 429]
    assert statuses(port, path, 1, headers={header: "b"}) == [200]
    for nobody in ({}, {header: ""}, {header: "  "}):
        address = by(f"203.0.113.{100 + len(str(nobody))}")
        assert statuses(port, path, 3, headers=nobody | address) == [200, 200, 429]


# Abuse


def test_what_is_not_found_and_whose_session_is_unknown_is_told_to_abuse(
    framework: str, settings: Settings, room: Stillroom, client: Any
) -> None:
    """A missing page and an unknown session are reported to abuse, once each, where limits are on endpoints."""
    with serving(framework, settings) as port:
        ask(port, "/missing", headers=by("203.0.113.7"))
        ask(port, "/missing.png", headers=by("203.0.113.7") | {"Sec-Fetch-Site": "cross-site"})
        for _ in range(2):  # by itself, and in one batch with the limits
            Browser(port, make_token(3, b"x" * 32)).get("/touch", headers=by("203.0.113.8"))
    told = [fields for _, fields in client.xrange(room.keys.abuse)]
    assert sorted((e[b"kind"], e[b"ip"], e.get(b"route")) for e in told) == [
        (b"not_found", b"203.0.113.7", b"/missing"),
        (b"session_unknown", b"203.0.113.8", None),
        (b"session_unknown", b"203.0.113.8", None),
    ]


# Which endpoints


def test_endpoints_may_share_a_limit(port: int) -> None:
    """Endpoints share a limit by its name."""
    got = [ask(port, path).status for path in ("/shared/a", "/shared/b", "/shared/a", "/shared/b")]
    assert got == [200, 200, 429, 429]


def test_several_limits_on_one_endpoint_all_hold(port: int) -> None:
    """All limits of one endpoint hold, and the response reports each of them once."""
    reply = ask(port, "/both")
    assert read(reply.one("ratelimit-policy")).keys() == {"api", "two"}
    assert reply.one("x-ratelimit-limit") == "2"
    assert statuses(port, "/both", 2) == [200, 429]


def test_a_group_limits_its_endpoints(framework: str, port: int) -> None:
    """A group limits its endpoints, also those with limits of their own and without the exempt ones."""
    assert statuses(port, "/group/own", 2) == [200, 429]
    if framework != "starlette":  # its Mount limits whatever it leads to
        assert statuses(port, "/group/free", 5) == [200] * 5
    assert statuses(port, "/group/x", 3)[-1] == 429
    assert statuses(port, "/open", 5) == [200] * 5
    assert not [name for name, _ in ask(port, "/open").headers if "ratelimit" in name.lower()]


def test_an_exempt_endpoint_keeps_its_own_limits(framework: str, port: int) -> None:
    """An endpoint that is exempt from its group's limits has those that it carries itself, and no others."""
    if framework == "starlette":  # its Mount limits whatever it leads to
        return
    first = ask(port, "/group/freed")
    assert (first.status, read(first.one("ratelimit-policy")).keys()) == (200, {"one"})
    assert statuses(port, "/group/freed", 2) == [429, 429]
    if framework != "fastapi":  # which has no classes of views
        assert statuses(port, "/group/class", 3) == [200] * 3
        assert statuses(port, "/group/class", 3, "POST") == [200, 200, 429]
    assert statuses(port, "/group/x", 3) == [200, 200, 429]


def test_what_is_made_of_an_exempt_class_is_exempt_and_no_subclass_of_it() -> None:
    """An exempt class of views frees what is made of it. A login that extends it keeps the limits of its group."""

    @exempt
    class Status:
        def __call__(self) -> None: ...

    class Login(Status): ...

    assert is_exempt(Status)
    assert is_exempt(Status())
    assert not is_exempt(Login)
    assert not is_exempt(Login())
    assert is_exempt(exempt(Login()))
    for made_of, expected in ((Status, True), (Login, False)):
        assert is_exempt(SimpleNamespace(view_class=made_of)) is expected


def test_functions_and_classes_are_endpoints(port: int) -> None:
    """Sync and async functions, methods of a class and whole classes can have limits."""
    assert statuses(port, "/sync/7", 3) == [200, 200, 429]
    assert statuses(port, "/async", 3, headers=by("203.0.113.1")) == [200, 200, 429]
    where = by("203.0.113.2")
    assert statuses(port, "/class", 1, headers=where) == [200]
    assert statuses(port, "/class", 2, "POST", where) == [200, 429]
    where = by("203.0.113.3")
    assert statuses(port, "/method", 3, headers=where) == [200] * 3
    assert statuses(port, "/method", 3, "POST", where) == [200, 200, 429]


@pytest.mark.parametrize("framework", ["django", "django-asgi"], indirect=True)
def test_a_class_of_async_views_is_an_endpoint(port: int) -> None:
    """`method_decorator(limited(…), name="dispatch")` limits a class with async views."""
    assert statuses(port, "/async-class", 3) == [200, 200, 429]


def test_a_request_may_be_exempt_by_a_predicate(port: int) -> None:
    """A predicate exempts a request from the endpoint's own limits."""
    assert statuses(port, "/probed", 3, headers={"X-Probe": "1"}) == [200] * 3
    assert statuses(port, "/probed", 2) == [200, 429]


def test_a_place_is_held_until_the_response_is_over(framework: str, port: int) -> None:
    """A place is held to the last piece of a streamed response, and other requests are refused meanwhile."""
    path = "/async-stream" if framework == "django-asgi" else "/stream"
    GATE.clear()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.read(5) == b"first"
        denied = ask(port, path)
        assert (denied.status, denied.one("retry-after")) == (429, "1")
        GATE.set()
        assert response.read() == b"second"
    finally:
        GATE.set()
        connection.close()
    until(lambda: ask(port, path).status == 200, "a place to be free")


def test_a_place_is_free_when_its_client_has_the_whole_response(framework: str, port: int) -> None:
    """Who has as many bytes as the response's length says may ask again, although the app's stream goes on."""
    path = "/async-sized" if framework == "django-asgi" else "/sized"
    GATE.clear()
    try:
        for _ in range(3):
            reply = ask(port, path)
            assert (reply.status, reply.body) == (200, b"all")
    finally:
        GATE.set()


def test_a_place_is_given_back_where_the_app_fails(port: int, room: Stillroom) -> None:
    """A place is given back when the app raises."""
    assert ask(port, "/fails").status == 500
    until(
        lambda: room.limits.peek("127.0.0.1", [PLACE]).remaining == 1, "the place to be given back"
    )


# What is told


def test_a_refusal_tells_when_to_come_again(port: int) -> None:
    """A denial is 429, problem+json with Retry-After, and a page of another origin may read it."""
    for _ in range(2):
        reply = ask(port, "/sync/7", headers=FROM_SPA)
        assert read(reply.one("ratelimit-policy")) == {"two": {"q": 2, "w": 60}}
    denied = ask(port, "/sync/7", headers=FROM_SPA)
    assert (denied.status, denied.one("content-type")) == (429, "application/problem+json")
    assert json.loads(denied.text)["violated-policies"] == ["two"]
    assert 1 <= int(denied.one("retry-after") or 0) <= 60
    assert denied.one("cache-control") == "no-store"
    for one in (reply, denied):
        exposed = {
            name.strip().lower()
            for name in str(one.one("access-control-expose-headers")).split(",")
        }
        assert {"ratelimit", "ratelimit-policy", "retry-after"} <= exposed
        assert one.one("access-control-allow-origin") == ORIGIN
    assert ask(port, "/sync/7").one("access-control-expose-headers") is None


def test_a_head_request_gets_no_body(port: int) -> None:
    """A denial of HEAD has the length of the body and no body."""
    assert statuses(port, "/sync/7", 2) == [200, 200]
    head = ask(port, "/sync/7", "HEAD")
    assert head.body == b""
    assert head.status in (429, 405)


def test_an_app_has_its_own_words(framework: str, settings: Settings) -> None:
    """An app may word a denial itself by the request's Accept; None keeps problem+json."""

    def render(refusal: Refusal) -> tuple[str, str] | None:
        if "text/html" not in refusal.header("accept"):
            return None
        return "text/html", f"<h1>{refusal.status}: {refusal.path}</h1>"

    with serving(framework, settings, render=render) as port:
        assert statuses(port, "/sync/7", 2) == [200, 200]
        page = ask(port, "/sync/7", headers={"Accept": "text/html"})
        assert (page.status, page.one("content-type")) == (429, "text/html")
        assert page.text == "<h1>429: /sync/7</h1>"
        assert page.one("retry-after")
        assert read(page.one("ratelimit")).keys() == {"two"}
        assert ask(port, "/sync/7").one("content-type") == "application/problem+json"


# Preflights


def test_a_preflight_costs_nothing(port: int) -> None:
    """A preflight costs nothing, is answered by the app's CORS layer and may come any number of times."""
    for path in ("/sync/7", "/group/x", "/guess"):
        assert statuses(port, path, 10, "OPTIONS", PREFLIGHT) == [200] * 10
    assert statuses(port, "/sync/7", 3) == [200, 200, 429]
    assert ask(port, "/sync/7", "OPTIONS", PREFLIGHT).one("access-control-allow-origin") == ORIGIN


# What it costs


def test_endpoint_limits_and_session_are_one_round_trip(port: int, client: Any) -> None:
    """Endpoint limits and session are one round trip once an endpoint is known to use its session."""
    browser = Browser(port)
    browser.get("/login?who=ann")
    for _ in range(3):
        assert browser.get("/touch").text.strip('"') == "ann"
        browser.get("/cost?n=0")
    assert trips(client, lambda: browser.get("/touch")) == (1, 3)
    assert trips(client, lambda: browser.get("/cost?n=0")) == (1, 1)
    assert trips(client, lambda: browser.get("/open")) == (0, 0)


def test_limits_session_and_five_values_that_are_kept_are_one_round_trip(
    port: int, client: Any
) -> None:
    """The proof of what the process keeps rides along, where the endpoint's last request read it."""
    browser = Browser(port)
    browser.get("/login?who=ann")
    for _ in range(4):
        assert browser.get("/page").text.strip('"') == "ann 10"
        browser.get("/cost?n=0")
    assert trips(client, lambda: browser.get("/page")) == (1, 4)
    assert trips(client, lambda: browser.get("/cost?n=0")) == (1, 1)


@pytest.mark.parametrize("framework", ["fastapi", "starlette"], indirect=True)
def test_what_is_on_two_servers_is_asked_for_at_once(
    framework: str, settings: Settings, client: Any, own_server: Any
) -> None:
    """Limits and session, and the proof of what the process keeps: one round trip with each server."""
    apart = Settings(**settings.model_dump() | {"cache_url": own_server.url})
    with serving(framework, apart) as port, redis.Redis.from_url(own_server.url) as of_cache:
        browser = Browser(port)
        browser.get("/login?who=ann")
        for _ in range(4):
            browser.get("/page")
        assert trips(client, lambda: browser.get("/page")) == (1, 3)
        assert trips(of_cache, lambda: browser.get("/page")) == (1, 1)


@pytest.mark.parametrize("kind", ["fastapi:FastAPI", "starlette.applications:Starlette"])
def test_limits_of_an_endpoint_bring_request_session_along(
    settings: Settings, client: Any, kind: str
) -> None:
    """`request.session` behind `@limited` is one round trip with the limit: nothing is read ahead of both."""
    from pkgutil import resolve_name

    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from stillroom import AsyncStillroom
    from stillroom.web.asgi import StillroomMiddleware
    from stillroom.web.starlette import limited

    @limited(Limit("page", 1_000, 60))
    async def page(request: Any) -> JSONResponse:
        return JSONResponse(request.session["theme"])

    async def begin(request: Any) -> JSONResponse:
        request.session["theme"] = "dark"
        return JSONResponse({})

    def app(room: Any) -> Any:
        made = resolve_name(kind)(routes=[Route("/page", page), Route("/begin", begin)])
        made.add_middleware(StillroomMiddleware, room=room)
        return made

    with serving_asgi(app, AsyncStillroom(settings, dispatch=NoDispatch())) as port:
        browser = Browser(port)
        browser.get("/begin")
        for _ in range(2):
            assert browser.get("/page").text == '"dark"'
        assert trips(client, lambda: browser.get("/page")) == (1, 3)


@pytest.mark.parametrize("framework", ["fastapi", "starlette"], indirect=True)
def test_the_table_and_the_session_are_one_round_trip_and_the_endpoint_another(
    framework: str, settings: Settings, client: Any
) -> None:
    """The table and the session are one round trip.

    The endpoint's limits, known only after routing, are another.
    """
    table = Routes([], default=[Limit("all", 1_000, 60)])
    with serving(framework, settings, routes=table) as port:
        browser = Browser(port)
        browser.get("/login?who=ann")
        for _ in range(3):
            browser.get("/touch")
        assert trips(client, lambda: browser.get("/touch")) == (2, 4)


def trips(client: Any, act: Callable[[], object]) -> tuple[int, int]:
    """Count the round trips and commands of an act, without those that are sent now and then."""
    before = client.info("stats")["total_reads_processed"]
    act()
    reads = client.info("stats")["total_reads_processed"] - before - 1
    return reads, len(sent(client, act, but=ON_ITS_WAY))


def test_a_denied_client_costs_redis_nothing(port: int, client: Any) -> None:
    """A client that is denied from memory costs Redis nothing, at an endpoint too."""
    assert statuses(port, "/sync/7", 3) == [200, 200, 429]
    before = client.info("stats")["total_commands_processed"]
    assert statuses(port, "/sync/7", 5) == [429] * 5
    assert client.info("stats")["total_commands_processed"] - before == 1


# What else Flask and Django have


@pytest.mark.parametrize("framework", ["flask", "django", "django-asgi"], indirect=True)
def test_endpoints_without_limits_have_the_default(framework: str, settings: Settings) -> None:
    """An endpoint without limits has the default ones, and an endpoint with its own has only those."""
    with serving(framework, settings, default=[Limit("default", 3, 60)]) as port:
        assert statuses(port, "/open", 4) == [200] * 3 + [429]
        assert statuses(port, "/sync/7", 3) == [200, 200, 429]
        assert statuses(port, "/group/free", 5) == [200] * 5


@pytest.mark.parametrize("framework", ["flask", "django", "django-asgi"], indirect=True)
def test_a_method_with_limits_is_not_charged_the_default(
    framework: str, settings: Settings
) -> None:
    """A method of a class has only its own limits, and the other methods have the default ones."""
    with serving(framework, settings, default=[Limit("default", 3, 60)]) as port:
        assert statuses(port, "/method", 3, "POST") == [200, 200, 429]
        assert statuses(port, "/method", 4) == [200] * 3 + [429]


@pytest.mark.parametrize("framework", ["flask", "django", "django-asgi"], indirect=True)
def test_requests_may_be_exempt_everywhere(framework: str, settings: Settings) -> None:
    """A predicate of the extension or the middleware exempts requests everywhere."""

    def is_probe(request: Any) -> bool:
        return bool(request.headers.get("X-Probe"))

    with serving(framework, settings, exempt_when=is_probe) as port:
        for path in ("/sync/7", "/method", "/group/own"):
            method = "POST" if path == "/method" else "GET"
            assert statuses(port, path, 4, method, {"X-Probe": "1"}) == [200] * 4
        assert statuses(port, "/sync/7", 3) == [200, 200, 429]


# Mistakes


@pytest.mark.parametrize("where", ["starlette", "fastapi", "flask", "django.limits"])
@pytest.mark.parametrize(
    ("limits", "options", "reason"),
    [
        ([], {}, "it needs limits"),
        (["auth"], {}, "a limit is a Limit"),
        ([DEFAULT], {"by": "usr"}, r"did you mean user\?"),
        ([DEFAULT], {"by": "key"}, "a function of the request"),
        ([DEFAULT], {"by": Header("X-API-Key:")}, "'X-API-Key:': a header's name has"),
        ([DEFAULT], {"by": Header("")}, "a header's name has"),
        ([Limit("x", 1, 60, by="key")], {}, "counts by key, which no request has"),
        ([DEFAULT], {"count": "failure"}, r"did you mean failures\?"),
        ([DEFAULT], {"cost": -1}, "cost is a whole number"),
    ],
)
def test_what_cannot_be_meant_is_said_where_it_is_written(
    where: str, limits: list[Any], options: dict[str, Any], reason: str
) -> None:
    """A bad declaration raises when the app is made and not when a request comes."""
    import importlib

    import tests.web.test_django  # noqa: F401 - configures Django

    module = importlib.import_module(f"stillroom.web.{where}")
    with pytest.raises(InvalidLimit, match=reason):
        module.limited(*limits, **options)


def test_counting_together_holds_under_threads(settings: Settings) -> None:
    """Two declarations for one request are one script under threads too: if one denies, the other takes nothing."""
    with serving("flask", settings) as port:
        got = at_once(8, lambda _: ask(port, "/both").status)
        assert sorted(got) == [200] * 2 + [429] * 6
    with Stillroom(settings) as room:
        left = room.limits.peek("127.0.0.1", [Limit("api", 1000, 3600)]).remaining
    assert left == 998


def in_flask(settings: Settings, key: Any) -> Any:
    """Return a client of an app of Flask with a handler for this, and one limited endpoint."""
    from flask import Flask

    from stillroom.web.flask import LimitExceeded, StillroomLimits, limited

    app = Flask("words")
    StillroomLimits(app, Stillroom(settings))
    app.register_error_handler(key or LimitExceeded, lambda error: ("own words", error.code))
    limit = Limit("words", 1, 60, away="strict")
    app.add_url_rule("/", "view", limited(limit)(lambda: "done"))
    return contextlib.nullcontext(app.test_client())


def in_fastapi(settings: Settings, key: Any) -> Any:
    """Return a client of an app of FastAPI with a handler for this, and one limited endpoint."""
    from fastapi import Depends, FastAPI
    from fastapi.testclient import TestClient
    from starlette.responses import PlainTextResponse

    from stillroom import AsyncStillroom
    from stillroom.web.asgi import StillroomMiddleware
    from stillroom.web.fastapi import LimitExceeded, limited

    room = AsyncStillroom(settings)
    app = FastAPI(lifespan=room.lifespan)
    app.add_middleware(StillroomMiddleware, room=room)

    @app.exception_handler(key or LimitExceeded)
    async def words(_: Any, error: Any) -> PlainTextResponse:
        return PlainTextResponse("own words", error.status_code)

    @app.get("/", dependencies=[Depends(limited(Limit("words", 1, 60, away="strict")))])
    async def view() -> str:
        return "done"

    return TestClient(app)


def test_limits_around_an_app_take_it_by_its_name() -> None:
    """A `Middleware(limited(…))` is given its app by position, or by name, as in older Starlettes."""
    from stillroom.web.starlette import limited

    def inner(scope: Any, receive: Any, send: Any) -> Any:
        raise AssertionError("nobody asks")

    put_on: Any = limited(Limit("around", 1, 60))
    assert put_on(inner).app is put_on(app=inner).app is inner


@pytest.mark.any_server
def test_limits_on_a_middleware_function_are_answered(settings: Settings) -> None:
    """`@limited` on a middleware of `@app.middleware("http")`, further out than all handlers, is a 429."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from starlette.requests import Request

    from stillroom import AsyncStillroom
    from stillroom.web.asgi import StillroomMiddleware
    from stillroom.web.starlette import limited

    room = AsyncStillroom(settings)
    app = FastAPI(lifespan=room.lifespan)

    @app.middleware("http")
    @limited(Limit("everywhere", 1, 60))
    async def passes(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    app.add_middleware(StillroomMiddleware, room=room)
    with TestClient(app) as client:
        assert client.get("/").status_code == 404
        refused = client.get("/")
    assert refused.status_code == 429
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert int(refused.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("words", [None, "own words"])
@pytest.mark.parametrize("on", ["errorhandler", "after_request"])
def test_limits_on_handlers_of_flask_are_answered(
    room: Stillroom, on: str, words: str | None
) -> None:
    """`@limited` on an error handler of Flask, or on an `after_request` function, is a 429, in the app's words."""
    from flask import Flask

    from stillroom.web.flask import LimitExceeded, StillroomLimits, limited

    app = Flask("handlers")
    StillroomLimits(app, room)
    app.testing = True
    guarded = limited(Limit(f"{on}{len(words or [])}", 1, 60))
    if on == "errorhandler":
        app.errorhandler(404)(guarded(lambda error: ("no page", 404)))
    else:
        app.after_request(guarded(lambda response: response))
    if words:
        app.errorhandler(LimitExceeded)(lambda error: (words, error.code))
    client = app.test_client()
    answers = [client.get("/") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [404, 429]
    assert int(answers[1].headers["Retry-After"]) >= 1
    assert (answers[1].text == words) == bool(words)


def test_annotations_of_a_limited_endpoint_are_those_of_its_module() -> None:
    """A limited endpoint's annotations that are texts are read in its own module, and others are left."""
    from stillroom.web.starlette import limited

    def endpoint(header: Header, hidden: NowhereImported) -> Reply:  # type: ignore[name-defined]  # noqa: F821
        return Reply(200, [], b"")

    made = inspect.signature(limited(Limit("texts", 1, 60))(endpoint))
    assert made.parameters["header"].annotation is Header
    assert made.parameters["hidden"].annotation == "NowhereImported"
    assert made.return_annotation is Reply


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("by_status", [True, False], ids=["status", "class"])
@pytest.mark.parametrize("make", [in_flask, in_fastapi])
def test_an_app_s_error_handler_words_its_refusals(
    settings: Settings, make: Any, by_status: bool, status: int
) -> None:
    """A handler for 429, for 503 or for LimitExceeded answers a refusal; the headers of limits are added to it."""
    if status == 503:
        away = {"redis_url": "redis://127.0.0.1:1", "limits_strict_503": True}
        settings = settings.model_copy(update=away)
    with make(settings, status if by_status else None) as client:
        client.get("/")
        answer = client.get("/")
    assert (answer.status_code, answer.text) == (status, "own words")
    assert int(answer.headers["Retry-After"]) >= 1


def test_flask_s_handler_of_refusals_goes_before_that_of_a_status(settings: Settings) -> None:
    """An app of Flask with a handler for LimitExceeded words by it, and by none for 429, which is for others."""
    with in_flask(settings, None) as client:
        client.application.register_error_handler(429, lambda error: ("others' words", 429))
        client.get("/")
        assert client.get("/").text == "own words"


def test_a_room_of_the_other_face_is_refused(settings: Settings) -> None:
    """A room of the other face is refused, by Flask's extension too."""
    from flask import Flask

    from stillroom import AsyncStillroom
    from stillroom.web.flask import StillroomLimits

    with pytest.raises(SettingsError, match="needs a room of the type Stillroom"):
        StillroomLimits(Flask("x"), AsyncStillroom(settings))  # type: ignore[arg-type]


def test_a_limit_above_the_route_is_told(room: Stillroom, caplog: pytest.LogCaptureFixture) -> None:
    """A limit above the route is logged once, because it has no effect.

    The right order, and a class, log nothing.
    """
    from flask import Flask
    from flask.views import MethodView

    from stillroom.web.flask import StillroomLimits, limited

    app = Flask("orders")
    StillroomLimits(app, room)

    @limited(DEFAULT)
    @app.get("/lost")
    def lost() -> str:
        return "lost"

    @app.get("/kept")
    @limited(DEFAULT)
    @limited(Limit("more", 10, 60))
    def kept() -> str:
        return "kept"

    @limited(DEFAULT)
    class Whole(MethodView):
        def get(self) -> str:
            return "whole"

    app.add_url_rule("/whole", view_func=Whole.as_view("whole"))
    with app.test_client() as browser:
        for path in ("/kept", "/lost", "/whole", "/kept"):
            assert browser.get(path).status_code == 200
    told = [record.getMessage() for record in caplog.records if "limits nothing" in record.message]
    assert len(told) == 1
    assert "the view lost" in told[0]


@dataclass
class Tea:
    """An object as a view, that is equal to others and so can't be hashed."""

    kind: str

    def __call__(self) -> str:
        return self.kind


def test_a_view_that_can_t_be_hashed_is_limited(settings: Settings, room: Stillroom) -> None:
    """A dataclass' instance as a view, which all frameworks take, is limited as any other."""
    from django.urls import path
    from fastapi import Depends, FastAPI
    from fastapi.testclient import TestClient
    from flask import Flask

    from stillroom.web.asgi import StillroomMiddleware
    from stillroom.web.django.limits import limited as django_limited
    from stillroom.web.fastapi import limited
    from stillroom.web.flask import StillroomLimits
    from stillroom.web.starlette import limited as decorated

    flask, fastapi, twice = Flask("teas"), FastAPI(), Limit("teas", 2, 60)
    StillroomLimits(flask, room, default=[twice])
    flask.add_url_rule("/", "tea", Tea("rooibos"))
    fastapi.get("/", dependencies=[Depends(limited(replace(twice, name="more_teas")))])(Tea("mint"))
    fastapi.get("/decorated")(decorated(replace(twice, name="other_teas"))(Tea("peppermint")))
    fastapi.add_middleware(
        StillroomMiddleware, room=AsyncStillroom(settings, dispatch=NoDispatch())
    )
    for client in (flask.test_client(), TestClient(fastapi)):
        assert [client.get("/").status_code for _ in range(3)] == [200, 200, 429]
    assert [client.get("/decorated").status_code for _ in range(3)] == [200, 200, 429]
    in_django = django_limited(twice)(path("tea", Tea("green"))).resolve("tea")
    assert [one.limits for one in carried(in_django.func)] == [(twice,)]


def test_several_decorators_on_an_endpoint_of_fastapi(settings: Settings) -> None:
    """Each of several `@limited` on one endpoint charges, the outermost first, though it takes no request."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from stillroom.web.asgi import StillroomMiddleware
    from stillroom.web.starlette import limited

    inner, outer = (Limit(f"{name}_of_two", 2, 60) for name in ("inner", "outer"))
    app = FastAPI()

    @limited(inner)
    async def poured(cups: int = 1) -> int:
        return cups

    app.get("/")(limited(outer)(poured))
    app.get("/more")(limited(outer)(partial(poured, cups=3)))
    app.add_middleware(StillroomMiddleware, room=AsyncStillroom(settings, dispatch=NoDispatch()))
    client = TestClient(app)
    assert [client.get(path).json() for path in ("/?cups=2", "/more")] == [2, 3]
    assert client.get("/").headers["RateLimit"] == '"outer_of_two";r=0;t=60'


@pytest.mark.parametrize("order", ["around", "within"])
@pytest.mark.parametrize("is_async", [True, False])
def test_a_plain_decorator_beside_it(settings: Settings, order: str, is_async: bool) -> None:
    """A decorator that is a plain function stands around `@limited` or within it, for async endpoints too."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from stillroom.web.asgi import StillroomMiddleware
    from stillroom.web.starlette import limited

    def plain(function: Any) -> Any:
        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return called

    async def poured_async(cups: int = 1) -> int:
        return cups

    def poured(cups: int = 1) -> int:
        return cups

    app, own = FastAPI(), limited(Limit(f"{order}_{is_async}", 2, 60))
    view: Any = poured_async if is_async else poured
    app.get("/")(plain(own(view)) if order == "around" else own(plain(view)))
    app.add_middleware(StillroomMiddleware, room=AsyncStillroom(settings, dispatch=NoDispatch()))
    client = TestClient(app)
    assert client.get("/?cups=3").json() == 3
    assert [client.get("/").status_code for _ in range(2)] == [200, 429]


async def awaited_leaves(kind: str = "mint") -> AsyncIterator[str]:
    yield kind


def leaves(kind: str = "mint") -> Iterator[str]:
    yield kind


@pytest.mark.parametrize("stream", [awaited_leaves, leaves])
def test_a_stream_of_fastapi_is_limited(settings: Settings, stream: Any) -> None:
    """A generator as an endpoint is charged before its response begins, the outermost limit first."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from stillroom.web.asgi import StillroomMiddleware
    from stillroom.web.starlette import limited

    inner, outer = (Limit(name, 2, 60) for name in ("inner_leaves", "outer_leaves"))
    app = FastAPI()
    app.get("/")(limited(outer)(limited(inner)(stream)))
    app.add_middleware(StillroomMiddleware, room=AsyncStillroom(settings, dispatch=NoDispatch()))
    client = TestClient(app)
    assert [client.get("/?kind=tea").text.strip() for _ in range(2)] == ['"tea"'] * 2
    refused = client.get("/")
    assert refused.status_code == 429
    assert refused.headers["RateLimit-Policy"] == '"outer_leaves";q=2;w=60'
    (known,) = [one for one in known_routes(app) or [] if one.text == "/"]
    assert [one.limits for one in known.carries] == [(outer,), (inner,)]
    assert [one["name"] for one in app.openapi()["paths"]["/"]["get"]["parameters"]] == ["kind"]


@pytest.mark.parametrize("has_fastapi", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
def test_what_makes_a_response_of_a_generator_is_limited(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, is_async: bool, has_fastapi: bool
) -> None:
    """An endpoint of Starlette behind which a generator stands is charged as any other, with FastAPI or without."""
    from starlette import routing
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.testclient import TestClient

    from stillroom.web import starlette_limits
    from stillroom.web.asgi import StillroomMiddleware

    def streamed(generator: Any) -> Any:
        @wraps(generator)
        async def awaited(_: Any) -> StreamingResponse:
            return StreamingResponse(generator())

        @wraps(generator)
        def plain(_: Any) -> StreamingResponse:
            return StreamingResponse(generator())

        return awaited if is_async else plain

    if not has_fastapi:
        monkeypatch.setattr(starlette_limits, "find_spec", lambda name: None)
    inner, outer = (
        starlette_limits.limited(Limit(f"{name}_{is_async}_{has_fastapi}", quota, 60))
        for name, quota in (("inner", 2), ("outer", 3))
    )
    app = Starlette(routes=[routing.Route("/", outer(inner(streamed(awaited_leaves))))])
    app.add_middleware(StillroomMiddleware, room=AsyncStillroom(settings, dispatch=NoDispatch()))
    client = TestClient(app)
    answers = [client.get("/") for _ in range(4)]
    assert [one.status_code for one in answers] == [200, 200, 429, 429]
    assert [one.text for one in answers[:2]] == ["mint"] * 2
    policy = answers[2].headers["RateLimit-Policy"]
    assert [one.partition("_")[0] for one in policy.split(", ")] == ['"outer', '"inner']


def test_requests_in_one_app_context_are_each_charged(room: Stillroom) -> None:
    """Flask requests that share an app context, as a test's may, are each charged and told how they stand."""
    from flask import Flask

    from stillroom.web.flask import StillroomLimits, limited

    app = Flask("limited")
    StillroomLimits(app, room)
    app.get("/")(limited(Limit("shared_context", 3, 60))(lambda: "ok"))
    with app.app_context():
        client = app.test_client()
        answers = [client.get("/") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    left = [answer.headers["X-RateLimit-Remaining"] for answer in answers]
    assert left == ["2", "1", "0", "0"]


def _fails(_: object = None) -> None:
    raise RuntimeError("close")


class _BadBody:
    def __iter__(self) -> Iterator[bytes]:
        return iter([b"a"])

    def close(self) -> None:
        _fails()


@pytest.mark.parametrize("how", ["propagated", "exits", "after_request", "close", "stream"])
def test_a_place_is_given_back_where_flask_does_not_end_its_request(
    room: Stillroom, how: str
) -> None:
    """A Flask request gives its place back where no `after_request` function is called, or its body can't close."""
    from flask import Flask, Response

    from stillroom.web.flask import StillroomLimits, limited

    app = Flask("limited")
    app.config["PROPAGATE_EXCEPTIONS"] = how != "after_request"
    StillroomLimits(app, room)
    if how == "after_request":
        app.after_request(_fails)

    @app.get("/")
    @limited(PLACE)
    def view() -> Response:
        if how == "exits":
            raise SystemExit(1)
        if how == "propagated":
            _fails()
        return Response(_BadBody() if how == "close" else map(_fails, "a"))

    with contextlib.suppress(RuntimeError, SystemExit):
        app.test_client().get("/", buffered=True).close()
    assert room.limits.peek("127.0.0.1", [PLACE]).remaining == 1


def test_a_stream_of_flask_that_ends_has_given_its_place_back(room: Stillroom) -> None:
    """A stream of Flask gives its place back when it ends. Its server tells the client before it closes it."""
    from flask import Flask, Response

    from stillroom.web.flask import StillroomLimits, limited

    app = Flask("limited")
    StillroomLimits(app, room)
    app.add_url_rule("/", view_func=limited(PLACE)(lambda: Response(iter("ab"))), endpoint="view")
    response = app.test_client().get("/")
    assert list(response.iter_encoded()) == [b"a", b"b"]
    assert room.limits.peek("127.0.0.1", [PLACE]).remaining == 1
    response.close()


def test_a_body_that_cannot_be_closed_gives_its_place_back(room: Stillroom) -> None:
    """The WSGI middleware gives a place in flight back where the app's body raises when it is closed."""
    from stillroom.web.wsgi import StillroomMiddleware

    def app(_: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return _BadBody()

    routes = Routes([Route("/", [PLACE])])
    environ = EnvironBuilder("/", environ_base={"REMOTE_ADDR": "127.0.0.1"}).get_environ()
    body: Any = StillroomMiddleware(app, room, routes=routes)(environ, lambda *_: len)
    with pytest.raises(RuntimeError, match="close"):
        body.close()
    assert room.limits.peek("127.0.0.1", [PLACE]).remaining == 1


def test_a_function_that_says_what_counts_and_raises_keeps_no_place(room: Stillroom) -> None:
    """A place in flight is given back where the app's `count` raises when it is asked about the answer."""
    from stillroom.web.wsgi import StillroomMiddleware

    def count(_: object) -> bool:
        raise RuntimeError("count")

    def app(_: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return [b"done"]

    routes = Routes([Route("/", [PLACE], count=count)])
    environ = EnvironBuilder("/", environ_base={"REMOTE_ADDR": "127.0.0.1"}).get_environ()
    with pytest.raises(RuntimeError, match="count"):
        list(StillroomMiddleware(app, room, routes=routes)(environ, lambda *_: len))
    assert room.limits.peek("127.0.0.1", [PLACE]).remaining == 1


def test_clients_behind_a_socket_file_are_told_apart(settings: Settings, tmp_path: Path) -> None:
    """Clients of a proxy at a socket file each have a quota of their own, also at Werkzeug's server, which says
    `<local>` of every peer there.
    """
    file = str(tmp_path / "shop.sock")
    with Stillroom(settings.model_copy(update={"trusted_proxies": ("unix",)})) as room:
        middleware = WsgiMiddleware(_ok, room, routes=Routes([Route("/", [ONE])]))
        with make_server(f"unix://{file}", 0, middleware, threaded=True) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                lines = [_first_line(file, f"203.0.113.{n}") for n in (7, 7, 8)]
            finally:
                server.shutdown()
                thread.join()
    assert [line.split()[1] for line in lines] == ["200", "429", "200"]


def _ok(_: Any, start_response: Any) -> Any:
    start_response("200 OK", [])
    return [b"ok"]


def _first_line(file: str, client: str) -> str:
    """Ask at a socket file as a proxy does that speaks for this client."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WITHIN)
        connection.connect(file)
        asked = f"GET / HTTP/1.1\r\nHost: shop\r\nX-Forwarded-For: {client}\r\nConnection: close\r\n\r\n"
        connection.sendall(asked.encode())
        return connection.makefile().readline()
