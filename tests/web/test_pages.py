"""Pages are cached over real HTTP with tags, ETag and 304, and never for a request with a session."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

import hishel
import pytest
from fastapi import APIRouter, BackgroundTasks, Cookie, Depends, FastAPI, Header, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from flask import Flask, Response, url_for
from flask import request as flask_request
from flask.views import MethodView
from hishel.httpx2 import CacheClient
from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

import redis
from stillroom import (
    AsyncStillroom,
    InlineDispatch,
    InvalidArgument,
    InvalidKey,
    Limit,
    NoDispatch,
    Routes,
    Settings,
    SettingsError,
    Stillroom,
)
from stillroom.testing import Clock
from stillroom.web.asgi import StillroomMiddleware
from stillroom.web.fastapi import limited as limited_by_fastapi
from stillroom.web.fastapi_room import CurrentSession
from stillroom.web.flask import StillroomLimits
from stillroom.web.flask import limited as limited_by_flask
from stillroom.web.pages import Pages, tag_page
from stillroom.web.wsgi import StillroomMiddleware as WsgiMiddleware
from tests.support.bookshop import Shop, serving
from tests.support.entries import Recording
from tests.support.held import Held
from tests.support.threads import at_once
from tests.support.web import WITHIN, Reply, ask

PRODUCT = "/products/7"


@pytest.fixture(params=["fastapi", "flask"])
def face(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def dispatch() -> Recording:
    return Recording()


@pytest.fixture
def served(face: str, settings: Settings, dispatch: Recording) -> Iterator[tuple[int, Shop]]:
    with serving(face, settings, dispatch) as served:
        yield served


@pytest.fixture
def port(served: tuple[int, Shop]) -> int:
    return served[0]


@pytest.fixture
def shop(served: tuple[int, Shop]) -> Shop:
    return served[1]


def price(reply: Reply) -> int:
    assert reply.status == 200
    found: int = json.loads(reply.text)["price"]
    return found


# Served from the cache


def test_a_page_is_rendered_once_and_said_to_be_a_hit(port: int, shop: Shop) -> None:
    """A page is rendered once, and the second answer differs only in saying that it is a hit."""
    first, second = ask(port, PRODUCT), ask(port, PRODUCT)
    assert shop.calls == ["product"]
    assert first.body == second.body
    assert first.one("cache-status") == "stillroom; fwd=miss; stored"
    assert second.one("cache-status") == "stillroom; hit"
    assert second.one("content-type") == "application/json"
    assert second.one("content-length") == str(len(second.body))
    assert len(second.all("date")) <= 1


@pytest.mark.parametrize("tag", ["products", "product:7", "price:1"])
def test_a_tag_kills_it(port: int, shop: Shop, room: Stillroom, tag: str) -> None:
    """A page is invalidated by its constant tags, its parameters' tags, and the tags its view added."""
    assert price(ask(port, PRODUCT)) == 1
    shop.price = 2
    room.cache.invalidate_by_tag("product:8")
    assert price(ask(port, PRODUCT)) == 1
    room.cache.invalidate_by_tag(tag)
    assert price(ask(port, PRODUCT)) == 2


def test_a_parameter_is_what_the_view_gets(port: int, shop: Shop, room: Stillroom) -> None:
    """`/products/007` is product 7 and is invalidated with it, because the view gets the parsed parameter."""
    assert price(ask(port, "/products/007")) == 1
    shop.price = 2
    room.cache.invalidate_by_tag("product:7")
    assert price(ask(port, "/products/007")) == 2


def test_a_stale_page_is_served_and_refreshed_by_a_worker(
    port: int, shop: Shop, room: Stillroom, dispatch: Recording, settings: Settings
) -> None:
    """A stale page is served while a worker renders it with the app, without a request, and nobody waits."""
    assert price(ask(port, PRODUCT)) == 1
    shop.price = 2
    Clock(room).advance(61)
    assert price(ask(port, PRODUCT)) == 1
    assert [order.loader for order in dispatch.orders] == [
        "page.tests.support.bookshop.fastapi_shop.product"
        if shop.face == "fastapi"
        else "page.tests.support.bookshop.flask_shop.product"
    ]
    with Stillroom(settings, dispatch=NoDispatch()) as worker:
        worker.cache.loaders.adopt(shop.room.cache.loaders)
        assert dispatch.run_all(worker) == ["refreshed"]
    assert price(ask(port, PRODUCT)) == 2
    assert shop.calls == ["product", "product"]


def test_a_worker_s_process_renders_with_an_app_nobody_has_asked(
    face: str, settings: Settings, room: Stillroom
) -> None:
    """A worker's process imports the app to render a page and never serves it."""
    kind = Stillroom if face == "flask" else AsyncStillroom
    recording, there = Recording(), {"Host": "shop.example"}
    with serving(face, settings, recording) as (port, _):
        assert price(ask(port, PRODUCT, headers=there)) == 1
        Clock(room).advance(61)
        ask(port, PRODUCT, headers=there)
    imported = Shop(face, kind(settings, dispatch=NoDispatch()))
    imported.price = 2
    with Stillroom(settings, dispatch=NoDispatch()) as worker:
        worker.cache.loaders.adopt(imported.room.cache.loaders)
        assert recording.run_all(worker) == ["refreshed"]
    with serving(face, settings) as (port, shop):
        assert price(ask(port, PRODUCT, headers=there)) == 2
        assert shop.calls == []


def test_many_at_once_render_it_once(port: int, shop: Shop) -> None:
    """When many ask at once, one renders the page and the others wait for it."""
    assert at_once(8, lambda _: price(ask(port, PRODUCT))) == [1] * 8
    assert shop.calls == ["product"]


@pytest.mark.parametrize(("how", "status"), [("private", 200), ("error", 503)])
def test_whoever_waits_for_another_process_in_vain_has_the_view_s_answer(
    face: str, settings: Settings, room: Stillroom, how: str, status: int
) -> None:
    """A request that has waited for another process' rendering, whose page is not kept, is answered by the view."""
    held, watching = Held(), threading.Event()
    asked: Any = {"path": f"/kept/{how}", "headers": {"Host": "shop.example"}}
    with serving(face, settings) as (first, shop), serving(face, settings) as (second, other):
        shop.called = lambda _: held.load()
        with ThreadPoolExecutor(2) as threads, redis.Redis.from_url(settings.redis_url) as client:
            rendering = threads.submit(ask, first, **asked)
            held.wait_until_called()
            lease = room.operations.cache.keys.lease(b"page")
            threads.submit(held.let_go_when_waited_for, client, lease, watching)
            assert watching.wait(WITHIN)
            assert ask(second, **asked).status == status
            assert rendering.result(WITHIN).status == status
        assert other.calls == [how]


def test_an_error_of_the_view_is_the_app_s(port: int, shop: Shop, room: Stillroom) -> None:
    """A view's error is the app's and is not kept; a stale page is served in its place."""
    shop.broken = True
    assert ask(port, PRODUCT).status == 500
    shop.broken = False
    assert price(ask(port, PRODUCT)) == 1
    shop.broken = True
    Clock(room).advance(61)
    assert price(ask(port, PRODUCT)) == 1


def test_redis_away_each_page_is_rendered(face: str) -> None:
    """When Redis is away each page is rendered, and nobody is refused."""
    away = Settings(redis_url="redis://127.0.0.1:1", session_peppers="p" * 40)
    with serving(face, away) as (port, shop):
        assert [price(ask(port, PRODUCT)) for _ in range(3)] == [1] * 3
        assert shop.calls == ["product"] * 3


# What tells pages apart


SAME = {
    "HEAD": (PRODUCT, {}, "HEAD"),
    "another browser": (PRODUCT, {"User-Agent": "other", "X-Forwarded-For": "1.2.3.4"}, "GET"),
    "analytics": (PRODUCT, {"Cookie": "_ga=1; _gid=2"}, "GET"),
    "a campaign": (PRODUCT + "?utm_source=x&gclid=1", {}, "GET"),
    "a reload": (PRODUCT, {"Cache-Control": "no-cache", "Pragma": "no-cache"}, "GET"),
    "a range": (PRODUCT, {"Range": "bytes=0-1"}, "GET"),
}
OTHER = {
    "another host": (PRODUCT, {"Host": "other.example"}, "GET"),
    "a named parameter": (PRODUCT + "?sort=price", {}, "GET"),
    "another page": (PRODUCT + "?page=2", {}, "GET"),
}
PAST = {
    "a session": (PRODUCT, {"Cookie": "sid=1"}, "GET"),
    "any cookie": (PRODUCT, {"Cookie": "_ga=1; theme=dark"}, "GET"),
    "authorization": (PRODUCT, {"Authorization": "Bearer x"}, "GET"),
    "an unknown parameter": (PRODUCT + "?q=1", {}, "GET"),
    "a very long address": (PRODUCT + "?sort=" + "x" * 1_000, {}, "GET"),
}


def visit(port: int, request: tuple[str, Mapping[str, str], str]) -> Reply:
    path, headers, method = request
    return ask(port, path, method, headers)


@pytest.mark.parametrize("request_", SAME.values(), ids=SAME)
def test_requests_that_differ_in_nothing_share_a_page(port: int, shop: Shop, request_: Any) -> None:
    """Requests that do not differ in the key share a page, and the view does not see other differences."""
    assert visit(port, request_).one("cache-status") == "stillroom; fwd=miss; stored"
    assert "user-agent" not in json.loads(ask(port, PRODUCT).text)["headers"]
    assert visit(port, request_).one("cache-status") == "stillroom; hit"
    assert shop.calls == ["product"]


@pytest.mark.parametrize("request_", OTHER.values(), ids=OTHER)
def test_requests_that_differ_have_pages_of_their_own(port: int, shop: Shop, request_: Any) -> None:
    """Requests that differ in the key have pages of their own, each rendered once."""
    one, other = ask(port, PRODUCT), visit(port, request_)
    assert one.text != other.text
    assert visit(port, request_).one("cache-status") == "stillroom; hit"
    assert shop.calls == ["product", "product"]


@pytest.mark.parametrize("request_", PAST.values(), ids=PAST)
def test_requests_that_are_somebody_s_own_go_past_the_cache(
    port: int, shop: Shop, request_: Any
) -> None:
    """A request with a session neither gets nor leaves a shared page, and caches on the way are told by Vary."""
    ask(port, PRODUCT)
    shop.price = 2
    past = visit(port, request_)
    assert price(past) == 2
    assert past.one("cache-status") == "stillroom; fwd=bypass"
    assert past.one("vary") == "Cookie, Authorization"
    is_session = bool({"Cookie", "Authorization"} & request_[1].keys())
    assert past.one("cache-control") == ("private" if is_session else None)
    assert price(ask(port, PRODUCT)) == 1


def test_the_order_of_parameters_does_not_matter(port: int, shop: Shop) -> None:
    """The order of query parameters does not matter: both orders are one page."""
    ask(port, PRODUCT + "?sort=a&page=2")
    assert ask(port, PRODUCT + "?page=2&sort=a").one("cache-status") == "stillroom; hit"


def test_a_named_header_tells_pages_apart(port: int, shop: Shop) -> None:
    """A named header tells pages apart, ignoring spaces, and a body that is not UTF-8 comes back as it was."""
    german = {"Accept-Language": "de,  en"}
    replies = [
        ask(port, "/api/greeting", headers=h) for h in (german, {"Accept-Language": "fr"}, german)
    ]
    assert [reply.body for reply in replies] == [b"\xe9 de, en", b"\xe9 fr", b"\xe9 de, en"]
    assert replies[2].one("cache-status") == "stillroom; hit"
    assert replies[2].one("vary") == "Accept-Language, Cookie, Authorization"
    assert shop.calls == ["greeting", "greeting"]


def test_other_routes_are_left_alone(port: int, shop: Shop) -> None:
    """Other routes, missing routes and other methods of a cached address are left alone."""
    assert ask(port, "/plain").one("cache-status") is None
    assert ask(port, "/nothing").status == 404
    assert ask(port, PRODUCT, "POST").status == 405
    assert shop.calls == ["plain"]


# What may be kept


@pytest.mark.parametrize("how", ["cookie", "private", "no-store", "no-cache", "vary", "nonce"])
def test_a_response_that_is_not_for_all_is_not_kept(port: int, shop: Shop, how: str) -> None:
    """A response that is not for everybody is not kept, and for a while no request tries to share it."""
    replies = [ask(port, f"/kept/{how}") for _ in range(3)]
    assert shop.calls == [how] * 4
    assert {reply.one("cache-status") for reply in replies} == {"stillroom; fwd=bypass"}


def test_a_view_that_answers_with_an_error_is_called_once(port: int, shop: Shop) -> None:
    """A view that answers with an error is called once, and the next request calls it again."""
    replies = [ask(port, "/kept/error") for _ in range(2)]
    assert [(reply.status, reply.text) for reply in replies] == [(503, "{}")] * 2
    assert shop.calls == ["error"] * 2


def test_a_page_that_is_too_large_is_not_kept(face: str, settings: Settings) -> None:
    """A page larger than a value may be is not kept, and no more than that is collected."""
    small = settings.model_copy(update={"decoded_limit": 200_000})
    with serving(face, small) as (port, shop):
        assert [len(ask(port, "/kept/large").body) for _ in range(2)] == [300_000] * 2
        assert shop.calls == ["large"] * 3


def test_a_page_that_is_too_large_is_not_kept_where_it_is_streamed_in_a_group(
    settings: Settings,
) -> None:
    """A page that is too large is answered where it is streamed in a group of tasks, as older Starlettes do."""
    small = settings.model_copy(update={"decoded_limit": 200_000})
    room = AsyncStillroom(small, dispatch=NoDispatch())
    app, pages = FastAPI(lifespan=room.lifespan), Pages(room)

    class Grouped:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.app(scope, receive, send))

    @app.get("/large")
    @pages.page(ttl=60)
    async def large() -> StreamingResponse:
        return StreamingResponse(iter([b"x" * 100_000] * 3))

    app.add_middleware(Grouped)
    pages.install(app)
    with TestClient(app) as client:
        assert [len(client.get("/large").content) for _ in range(2)] == [300_000] * 2


def test_a_missing_page_is_not_kept(port: int, shop: Shop) -> None:
    """A missing page is not kept, because anybody can ask for any address."""
    assert [ask(port, "/products/1001").status for _ in range(2)] == [404, 404]


@pytest.mark.parametrize(("how", "status"), [("moved", 301), ("stream", 200), ("own", 200)])
def test_other_responses_are_kept(port: int, shop: Shop, how: str, status: int) -> None:
    """A redirect, a streamed response and one with its own ETag and Cache-Control are kept."""
    one, other = ask(port, f"/kept/{how}"), ask(port, f"/kept/{how}")
    assert one.status == other.status == status
    assert one.body == other.body
    assert shop.calls == [how]
    if how == "moved":
        assert other.one("location") == "/about"
    if how == "own":
        assert other.one("etag") == '"own"'
        assert other.one("cache-control") == "public, max-age=5"


def test_a_page_that_is_the_same_for_all_is_given_to_sessions_too(port: int, shop: Shop) -> None:
    """An endpoint that says so gives its page to sessions too."""
    assert ask(port, "/about", headers={"Cookie": "sid=1"}).status == 200
    reply = ask(port, "/about", headers={"Authorization": "Bearer x"})
    assert reply.one("cache-status") == "stillroom; hit"
    assert reply.one("vary") is None
    said = "public, max-age=10, stale-while-revalidate=60, stale-if-error=3600"
    assert reply.one("cache-control") == said


# Conditional requests and caches on the way


def test_a_client_that_has_it_hears_304(port: int, shop: Shop) -> None:
    """A matching If-None-Match is answered 304 without a body, also among others or weakly compared."""
    etag = ask(port, PRODUCT).one("etag")
    assert etag is not None
    assert etag.startswith('W/"')
    for given in (etag, f'"other", {etag}', etag.removeprefix("W/"), "*"):
        reply = ask(port, PRODUCT, headers={"If-None-Match": given})
        assert (reply.status, reply.body) == (304, b"")
        assert reply.one("etag") == etag
        assert reply.one("cache-control") == "public, no-cache"
        assert reply.one("vary") == "Cookie, Authorization"
        assert reply.one("content-type") is None
    assert ask(port, PRODUCT, headers={"If-None-Match": '"other"'}).status == 200
    assert shop.calls == ["product"]


def test_a_client_that_has_an_older_one_hears_200(port: int, shop: Shop, room: Stillroom) -> None:
    """A client with an older page is answered 200, also when its request renders the page."""
    etag = ask(port, PRODUCT).one("etag") or ""
    shop.price = 2
    room.cache.invalidate_by_tag("products")
    reply = ask(port, PRODUCT, headers={"If-None-Match": etag})
    assert price(reply) == 2
    assert reply.one("etag") != etag


def test_a_date_decides_where_there_is_no_etag_in_the_request(port: int, shop: Shop) -> None:
    """If-Modified-Since decides only without If-None-Match, and a text that is no date is ignored."""
    asked = "If-Modified-Since"
    same, before = "Fri, 27 Nov 2026 10:00:00 GMT", "Thu, 26 Nov 2026 10:00:00 GMT"
    assert ask(port, "/kept/own", headers={asked: same}).status == 304
    assert ask(port, "/kept/own", headers={asked: before}).status == 200
    for other in ("yesterday", same.replace("27", "9" * 20), same.replace("GMT", "+" + "9" * 20)):
        assert ask(port, "/kept/own", headers={asked: other}).status == 200
    both = {asked: same, "If-None-Match": '"other"'}
    assert ask(port, "/kept/own", headers=both).status == 200


def test_cdns_hear_the_tags(face: str, settings: Settings) -> None:
    """CDNs get the tags in the header that each of them reads, also with a 304."""
    kinds = ["Surrogate-Key", "Cache-Tag", "Cache-Groups"]
    with serving(face, settings, cdn=kinds) as (port, _):
        for headers in ({}, {"If-None-Match": "*"}):
            reply = ask(port, PRODUCT, headers=headers)
            assert reply.one("surrogate-key") == "products product:7 price:1"
            assert reply.one("cache-tag") == "products,product:7,price:1"
            assert reply.one("cache-groups") == '"products", "product:7", "price:1"'


# Mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tags": ["product:{idd}"]}, "{idd} is no parameter of product; did you mean id"),
        ({"query": "page"}, "query='page': a list of names"),
        ({"query": None}, "query=None: a list of names"),
        ({"vary": [b"Accept"]}, "a list of names"),
        ({"vary": ["Cookie"]}, "the name of a header other than Cookie"),
        ({"max_age": -1}, "max_age=-1: a number of seconds from 0"),
        ({"ttl": "5m"}, "ttl='5m'"),
    ],
)
def test_a_mistake_is_told_where_it_is_written(
    room: Stillroom, options: dict[str, Any], said: str
) -> None:
    """A bad option raises at the endpoint when the app is made."""

    def product(id: int) -> None: ...

    with pytest.raises((InvalidKey, ValueError), match=said):
        Pages(room).page(**options)(product)


def test_other_mistakes(room: Stillroom) -> None:
    """The wrong room, a non-app, an unknown CDN header and two pages of one name raise clear errors."""
    with pytest.raises(TypeError, match="a Stillroom or AsyncStillroom"):
        Pages("room")  # type: ignore[type-var]
    with pytest.raises(SettingsError, match="did you mean Surrogate-Key"):
        Pages(room, cdn="Surrogate-Keys")
    with pytest.raises(ValueError, match=r"harmless_cookies='_ga\*': a list of names"):
        Pages(room, harmless_cookies="_ga*")  # of its letters, * would be any cookie
    with pytest.raises(TypeError, match="FastAPI, Starlette or Flask, not object"):
        Pages(room).install(object())
    with pytest.raises(SettingsError, match="need Pages\\(AsyncStillroom"):
        Pages(room).install(FastAPI())
    away = AsyncStillroom(Settings(redis_url="redis://127.0.0.1:1"), dispatch=InlineDispatch())
    with pytest.raises(SettingsError, match="needs Pages\\(Stillroom"):
        Pages(away).install(Flask("x"))
    pages = Pages(room)

    def one() -> None: ...
    def other() -> None: ...

    pages.page(name="same", ttl=timedelta(minutes=1))(one)
    with pytest.raises(ValueError, match="a page named 'same' already"):
        pages.page(name="same")(other)
    pages.page(name="same")(one)  # an app factory that is called again


def test_pages_that_nobody_can_render_say_so(room: Stillroom) -> None:
    """A page without `install` raises an error that says so."""
    pages = Pages(room)

    def view() -> None: ...

    pages.page(ttl=1)(view)
    with pytest.raises(SettingsError, match="install"):
        view.__stillroom_page__.load("http://x", "/", "")  # type: ignore[attr-defined]


# Somebody else's cache, which follows RFC 9111, between the client and the shop


@pytest.fixture
def browser(port: int) -> Iterator[Any]:
    """Make a client with a shared cache as a CDN has one."""
    storage = hishel.SqliteStorage(connection=sqlite3.connect(":memory:", check_same_thread=False))
    with CacheClient(storage=storage, rfc=True, base_url=f"http://127.0.0.1:{port}") as client:
        yield client


def is_kept(reply: Any) -> bool:
    """Return whether the cache answered without asking the app."""
    return bool(reply.extensions["caching"]["from_cache"])


def is_checked(reply: Any) -> bool:
    """Return whether the cache asked the app if its copy is still good."""
    return bool(reply.extensions["caching"]["revalidated"])


def test_another_cache_asks_each_time_and_hears_what_was_invalidated(
    browser: Any, shop: Shop, room: Stillroom
) -> None:
    """By default a shared cache asks each time and serves nothing invalidated; an unchanged page costs a 304."""
    assert not is_checked(browser.get(PRODUCT))
    again = browser.get(PRODUCT)
    assert is_checked(again)
    assert again.json()["price"] == 1
    assert shop.calls == ["product"]
    shop.price = 2
    room.cache.invalidate_by_tag("product:7")
    assert [browser.get(PRODUCT).json()["price"] for _ in range(2)] == [2, 2]
    assert shop.calls == ["product", "product"]


def test_another_cache_keeps_a_page_for_as_long_as_it_may(browser: Any, shop: Shop) -> None:
    """With `s_maxage` a shared cache keeps a page for that long, apart by the named header."""
    german, french = {"Accept-Language": "de"}, {"Accept-Language": "fr"}
    seen = [browser.get("/api/greeting", headers=h) for h in (german, german, french, german)]
    assert [is_kept(reply) for reply in seen] == [False, True, False, True]
    assert [reply.content for reply in seen] == [b"\xe9 de", b"\xe9 de", b"\xe9 fr", b"\xe9 de"]


def test_another_cache_never_mixes_a_session_with_the_rest(browser: Any, shop: Shop) -> None:
    """A shared cache gives no session's page to others and no shared page to a session."""
    language = {"Accept-Language": "de"}
    browser.get("/api/greeting", headers=language)
    for own in ({"Cookie": "sid=1"}, {"Authorization": "Bearer x"}):
        assert not is_kept(browser.get("/api/greeting", headers=language | own))
    assert is_kept(browser.get("/api/greeting", headers=language))
    assert shop.calls == ["greeting"] * 3


def test_another_cache_keeps_nothing_that_is_not_for_all(browser: Any, shop: Shop) -> None:
    """A shared cache keeps no page that Stillroom does not keep."""
    for path in ("/kept/private", "/kept/no-store"):
        assert browser.get(path).extensions["caching"]["stored"] is False
        assert not is_kept(browser.get(path))


def test_another_cache_serves_a_page_that_is_the_same_for_all(browser: Any, shop: Shop) -> None:
    """A shared cache serves a page for everybody to requests with a session and without."""
    browser.get("/about")
    assert is_kept(browser.get("/about", headers={"Cookie": "sid=1"}))
    assert shop.calls == ["about"]


# Beside other middleware


def test_rendering_spends_no_limits(settings: Settings) -> None:
    """Rendering in a worker spends no limits, because nobody asked for it."""
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    shop = Shop("fastapi", room)  # pages are the innermost here
    app = FastAPI(lifespan=room.lifespan)
    inner = Pages(room)
    app.add_middleware(StillroomMiddleware, room=room, routes=Routes(default=[Limit("few", 2, 60)]))
    inner.install(app)  # and the outermost here

    @app.get("/n/{n}")
    @inner.page(ttl=60)
    async def number(n: int) -> int:
        return n

    with TestClient(app) as client:
        assert [client.get(f"/n/{n}").status_code for n in range(5)] == [200] * 5
        assert [client.get("/other").status_code for _ in range(3)] == [404, 404, 429]
    assert shop.calls == []


@pytest.mark.parametrize("are_outermost", [True, False])
def test_rendering_spends_no_limits_of_an_endpoint(
    face: str, settings: Settings, are_outermost: bool
) -> None:
    """A shared page does not count at its endpoint, rendered or cached; an answer to one visitor does."""
    make = fastapi_with_a_limit if face == "fastapi" else flask_with_a_limit
    with make(settings, are_outermost) as get:
        assert [get(f"/n/{n}", {}) for n in range(5)] == [200] * 5
        assert [get("/n/1", {"Authorization": "Bearer x"}) for _ in range(3)] == [200, 200, 429]
        assert get("/n/7", {}) == 200


@contextmanager
def fastapi_with_a_limit(settings: Settings, are_outermost: bool) -> Iterator[Any]:
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    app, pages = FastAPI(lifespan=room.lifespan), Pages(room)

    @app.get("/n/{n}", dependencies=[Depends(limited_by_fastapi(Limit("few", 2, 60)))])
    @pages.page(ttl=60)
    async def number(n: int) -> int:
        return n

    if not are_outermost:
        pages.install(app)
    app.add_middleware(StillroomMiddleware, room=room)
    if are_outermost:
        pages.install(app)
    with TestClient(app) as client:
        yield lambda path, headers: client.get(path, headers=headers).status_code


@contextmanager
def flask_with_a_limit(settings: Settings, are_outermost: bool) -> Iterator[Any]:
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        app, pages = Flask("limited"), Pages(room)
        StillroomLimits(app, room)

        @app.get("/n/<int:n>")
        @limited_by_flask(Limit("few", 2, 60))
        @pages.page(ttl=60)
        def number(n: int) -> Any:
            return str(n)

        if not are_outermost:
            pages.install(app)
        app.wsgi_app = WsgiMiddleware(app.wsgi_app, room, sessions=False)  # type: ignore[method-assign]
        if are_outermost:
            pages.install(app)
        with app.test_client() as client:
            yield lambda path, headers: client.get(path, headers=headers).status_code


def test_a_page_behind_middleware_of_other_kinds_is_kept(settings: Settings) -> None:
    """A page is kept behind Starlette's BaseHTTPMiddleware, GZip, a background task and a stream."""
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    app, pages, story = FastAPI(lifespan=room.lifespan), Pages(room), []

    class Slow(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Any) -> Any:
            response = await call_next(request)
            response.headers["X-Seen"] = "yes"
            return response

    app.add_middleware(Slow)
    app.add_middleware(GZipMiddleware, minimum_size=10)
    pages.install(app)

    @app.get("/stream")
    @pages.page(ttl=60)
    async def stream(background: BackgroundTasks) -> StreamingResponse:
        background.add_task(story.append, "background")
        story.append("stream")

        async def pieces() -> Any:
            for _ in range(3):
                yield b"x" * 1_000

        return StreamingResponse(pieces(), background=background)

    with TestClient(app) as client:
        for _ in range(2):
            response = client.get("/stream")
            assert response.content == b"x" * 3_000
            assert response.headers["x-seen"] == "yes"
    assert story == ["stream", "background"]


def test_what_is_raised_behind_a_whole_page_is_told_and_costs_nobody_the_page(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A background task that fails, or what Flask calls on close, is in the log: the page was whole by then."""

    def fail() -> None:
        raise LookupError("behind the page")

    fastapi, pages = FastAPI(), Pages(AsyncStillroom(settings, dispatch=NoDispatch()))
    flask, theirs = Flask("late"), Pages(Stillroom(settings, dispatch=NoDispatch()))
    pages.install(fastapi)
    theirs.install(flask)

    @fastapi.get("/")
    @pages.page(ttl=60)
    def in_fastapi(background: BackgroundTasks) -> str:
        background.add_task(fail)
        return "page"

    @flask.get("/")
    @theirs.page(ttl=60)
    def in_flask() -> Response:
        response = Response("page")
        response.call_on_close(fail)
        return response

    for client in (TestClient(fastapi), flask.test_client()):
        said = [client.get("/").headers["cache-status"] for _ in range(2)]
        assert said == ["stillroom; fwd=miss; stored", "stillroom; hit"]
    told = [one for one in caplog.records if "then its app raised" in one.message]
    assert [one.exc_info and one.exc_info[0] for one in told] == [LookupError] * 2


class Visit:
    """A request for `/`, and its answer as it goes out."""

    def __init__(self, app: Any) -> None:
        self.told, self.whole = b"", asyncio.Event()
        http = {"type": "http", "method": "GET", "scheme": "http", "path": "/"}
        scope = {**http, "query_string": b"", "headers": [(b"host", b"shop")]}
        self.request = asyncio.ensure_future(app(scope, None, self._send))

    async def _send(self, message: Any) -> None:
        headers = dict(message.get("headers", ()))
        self.told += headers.get(b"cache-status", b"") + message.get("body", b"")
        if message["type"] == "http.response.body":
            self.whole.set()


def test_nobody_waits_for_what_a_page_does_behind_its_response(settings: Settings) -> None:
    """A page is answered and kept before its background tasks are done. Who had it rendered ends behind them."""
    may_end, story = asyncio.Event(), []

    async def slow() -> None:
        await may_end.wait()
        story.append("background")

    async def visits() -> None:
        app, room = FastAPI(), AsyncStillroom(settings, dispatch=NoDispatch())
        pages = Pages(room)
        pages.install(app)

        @app.get("/")
        @pages.page(ttl=60)
        async def page(background: BackgroundTasks) -> str:
            background.add_task(slow)
            return "page"

        async with asyncio.timeout(20), room:
            first = Visit(app)
            await first.whole.wait()
            second = Visit(app)
            await second.request
            assert first.told == b'stillroom; fwd=miss; stored"page"'
            assert second.told == b'stillroom; hit"page"'
            assert (first.request.done(), story) == (False, [])
            may_end.set()
            await first.request
            assert story == ["background"]

    asyncio.run(visits())


def test_a_request_that_is_cancelled_ends_its_view(settings: Settings) -> None:
    """A view that renders a page is cancelled with its request, and has ended when the request has."""
    story = []

    async def visits() -> None:
        app, room, began = (
            FastAPI(),
            AsyncStillroom(settings, dispatch=NoDispatch()),
            asyncio.Event(),
        )
        pages = Pages(room)
        pages.install(app)

        @app.get("/")
        @pages.page(ttl=60)
        async def page() -> str:
            began.set()
            try:
                return await asyncio.Event().wait() or "page"
            finally:
                await asyncio.sleep(0)
                story.append("ended")

        async with asyncio.timeout(20), room:
            visit = Visit(app)
            await began.wait()
            visit.request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await visit.request
            assert (story, visit.told) == (["ended"], b"")

    asyncio.run(visits())


# Addresses that only look like a page's


def test_an_app_of_another_host_is_no_page(settings: Settings) -> None:
    """What another host's app answers on the path of a page is not kept as that page."""
    calls: list[str] = []

    async def price(_: Any) -> PlainTextResponse:
        calls.append("price")
        return PlainTextResponse(f"price {len(calls)}")

    room = AsyncStillroom(settings, dispatch=NoDispatch())
    pages = Pages(room)

    @pages.page(ttl=60)
    async def product(_: Any) -> PlainTextResponse:
        return PlainTextResponse("page")

    inner = Starlette(routes=[Route("/products/{id}", price)])
    own = Route("/products/{id}", product)
    app = Starlette(routes=[Host("api.shop", app=inner), own], lifespan=room.lifespan)
    pages.install(app)
    with TestClient(app) as client:
        told = [client.get(PRODUCT, headers={"Host": "api.shop"}).text for _ in range(3)]
        assert told == ["price 1", "price 2", "price 3"]
        assert client.get(PRODUCT).text == "page"
        assert "hit" in client.get(PRODUCT).headers["cache-status"]


def told_by(app: Flask, host: str) -> list[str]:
    """Return what the app answers at `/` of a host, each time of three."""
    client = app.test_client()
    return [client.get("/", base_url=f"http://{host}").text for _ in range(3)]


def test_a_page_is_that_of_its_subdomain(settings: Settings) -> None:
    """A page of Flask is found by its subdomain, is invalidated by its own tags, and no other view becomes one."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        app = Flask("shop", subdomain_matching=True)
        app.config["SERVER_NAME"] = "shop.test"
        pages, calls = Pages(room), iter(range(100))
        pages.install(app)
        page = pages.page(ttl=60, tags=["home"])
        tenants = pages.page(ttl=60, tags=["tenant:{tenant}"])
        app.add_url_rule("/", "home", page(lambda: f"home {next(calls)}"))
        app.add_url_rule("/", "api", lambda: f"api {next(calls)}", subdomain="api")
        view = tenants(lambda tenant: f"{tenant} {next(calls)}")
        app.add_url_rule("/", "tenant", view, subdomain="<tenant>")
        assert told_by(app, "shop.test") == ["home 0"] * 3
        assert told_by(app, "api.shop.test") == ["api 1", "api 2", "api 3"]
        assert told_by(app, "acme.shop.test") == ["acme 4"] * 3
        room.cache.invalidate_by_tag("home")
        assert told_by(app, "acme.shop.test") == ["acme 4"] * 3
        room.cache.invalidate_by_tag("tenant:acme")
        assert told_by(app, "acme.shop.test") == ["acme 5"] * 3


def test_views_that_one_function_makes_have_their_own_tags(face: str, settings: Settings) -> None:
    """Each of several views that one function makes is kept as it says itself, and invalidated by its own tags."""
    room: Any = (Stillroom if face == "flask" else AsyncStillroom)(settings, dispatch=NoDispatch())
    pages: Pages[Any] = Pages(room)
    app: Any = Flask("shop") if face == "flask" else FastAPI(lifespan=room.lifespan)
    pages.install(app)
    calls = iter(range(100))

    def add(name: str) -> None:
        @pages.page(ttl=60, tags=[f"text:{name}"])
        def view() -> str:
            return f"{name} {next(calls)}"

        if face == "flask":
            app.add_url_rule(f"/{name}", name, view)
        else:
            app.add_api_route(f"/{name}", view)

    add("about")
    add("terms")
    with (
        Stillroom(settings) as beside,
        app.test_client() if face == "flask" else TestClient(app) as client,
    ):
        assert ["about 0" in client.get("/about").text for _ in range(2)] == [True, True]
        beside.cache.invalidate_by_tag("text:terms")
        assert "about 0" in client.get("/about").text
        beside.cache.invalidate_by_tag("text:about")
        assert "about 1" in client.get("/about").text


def test_views_that_one_function_makes_live_for_their_own_times(
    settings: Settings,
) -> None:
    """Of two views that one function makes, each is kept for as long as it says, whichever was made first."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        app, pages, calls = Flask("shop"), Pages(room), iter(range(100))
        pages.install(app)

        def add(name: str, **times: Any) -> None:
            view = pages.page(**times)(lambda: f"{name} {next(calls)}")
            app.add_url_rule(f"/{name}", name, view)

        add("long", ttl=600)
        add("short", ttl=60)
        add("usual")
        client = app.test_client()
        names = ("long", "short", "usual")
        assert [client.get(f"/{name}").text for name in names] == ["long 0", "short 1", "usual 2"]
        Clock(room).advance(61)
        assert [client.get(f"/{name}").text for name in names] == ["long 0", "short 3", "usual 2"]
        Clock(room).advance(int(settings.ttl))
        assert [client.get(f"/{name}").text for name in names] == ["long 0", "short 4", "usual 5"]


def test_a_status_without_a_name_is_the_app_s(settings: Settings) -> None:
    """A view of Flask may answer with a status that no standard names, as an error of a proxy's is passed on."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        app, pages = Flask("shop"), Pages(room)
        pages.install(app)
        app.add_url_rule("/", "view", pages.page(ttl=60)(lambda: ("away", 520)))
        answer = app.test_client().get("/")
        assert (answer.status_code, answer.text) == (520, "away")


@pytest.mark.parametrize("is_first", [False, True], ids=["behind", "in front"])
def test_a_page_has_the_addresses_that_its_visitors_see(
    face: str, settings: Settings, is_first: bool
) -> None:
    """Links in a page have the scheme of a proxy's visitors, whichever of the two middlewares was added first."""
    room: Any = (Stillroom if face == "flask" else AsyncStillroom)(settings, dispatch=NoDispatch())
    pages: Pages[Any] = Pages(room)
    app: Any = Flask("shop") if face == "flask" else FastAPI(lifespan=room.lifespan)
    if is_first:
        pages.install(app)
    if face == "flask":
        app.wsgi_app = ProxyFix(app.wsgi_app, x_proto=1)
    else:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts="*")
    if not is_first:
        pages.install(app)

    if face == "flask":
        app.add_url_rule("/", "home", pages.page(ttl=60)(lambda: url_for("home", _external=True)))
    else:

        @app.get("/", name="home")
        @pages.page(ttl=60)
        async def home(request: Request) -> str:
            return str(request.url_for("home"))

    with app.test_client() if face == "flask" else TestClient(app) as client:
        for expected in ("stored", "hit"):
            answer = client.get("/", headers={"X-Forwarded-Proto": "https"})
            assert expected in answer.headers["cache-status"]
            assert "https://" in answer.text


@pytest.mark.parametrize("matching", [{}, {"host_matching": True, "static_host": "shop.test"}])
def test_a_page_is_found_by_the_map_s_default_and_by_its_host(
    settings: Settings, matching: dict[str, Any]
) -> None:
    """A page of Flask is found where the map has a default subdomain, or matches whole hosts."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        app = Flask("shop", **matching)
        pages, calls = Pages(room), iter(range(100))
        pages.install(app)
        where = {"host": "shop.test"} if matching else {"subdomain": "www"}
        app.url_map.default_subdomain = "" if matching else "www"
        view = pages.page(ttl=60)(lambda: f"home {next(calls)}")
        app.add_url_rule("/", "home", view, **where)
        assert told_by(app, "shop.test") == ["home 0"] * 3


def test_a_path_that_begins_with_the_letters_of_the_root_is_a_page(settings: Settings) -> None:
    """A path that only begins with the letters of the root path is looked up whole, as the framework does."""
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    pages = Pages(room)

    @pages.page(ttl=60)
    async def product(_: Any) -> PlainTextResponse:
        return PlainTextResponse("page")

    app = Starlette(routes=[Route("/apis/products/7", product)], lifespan=room.lifespan)
    pages.install(app)
    with TestClient(app, root_path="/api") as client:
        assert client.get("/apis/products/7").text == "page"
        assert "hit" in client.get("/apis/products/7").headers["cache-status"]


@pytest.mark.parametrize(
    "host",
    ["[", "a:99999999", "a:b", "[::1", "a]b", "shop/evil", "u@shop", "[:]", "[1.2.3.4]"],
)
def test_a_host_that_is_none_is_the_app_s_business(port: int, shop: Shop, host: str) -> None:
    """A request whose Host is none is answered by the app itself, and never fails in the cache of pages."""
    told = ask(port, PRODUCT, headers={"Host": host})
    assert told.status < 500
    assert told.one("cache-status") in (None, "stillroom; fwd=bypass")


class QuietCors(CORSMiddleware):
    """The CORS layer of older Starlettes, which says nothing to a request without Origin."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        has_origin = any(name == b"origin" for name, _ in scope.get("headers", ()))
        await (super().__call__ if has_origin else self.app)(scope, receive, send)


QuietCors.__name__ = "CORSMiddleware"  # it is known by its name


@pytest.mark.parametrize("is_quiet", [False, True])
@pytest.mark.parametrize("vary", [[], ["Origin"]], ids=["to the app", "kept by origin"])
def test_a_page_of_another_origin_may_read_what_the_cors_layer_behind_it_allows(
    face: str, settings: Settings, vary: list[str], is_quiet: bool
) -> None:
    """A page that varies by Origin is not given to a request with one, unless it is kept by Origin."""
    room: Any = (Stillroom if face == "flask" else AsyncStillroom)(settings, dispatch=NoDispatch())
    app: Any = Flask("shop") if face == "flask" else FastAPI(lifespan=room.lifespan)
    pages: Pages[Any] = Pages(room)
    origins = ["https://a.example", "https://b.example"]
    if face == "flask":

        @app.after_request
        def cors(response: Response) -> Response:
            if (origin := flask_request.headers.get("Origin")) in origins:
                response.headers["Access-Control-Allow-Origin"] = str(origin)
            response.vary.add("Origin")
            return response

    else:
        app.add_middleware(QuietCors if is_quiet else CORSMiddleware, allow_origins=origins)
    pages.install(app)

    if face == "flask":
        app.add_url_rule("/", "home", pages.page(ttl=60, vary=vary)(lambda: "home"))
    else:

        @app.get("/")
        @pages.page(ttl=60, vary=vary)
        async def home() -> str:
            return "home"

    with app.test_client() if face == "flask" else TestClient(app) as client:
        for origin in (None, *origins, None, *origins):
            answer = client.get("/", headers={"Origin": origin} if origin else {})
            assert answer.headers.get("access-control-allow-origin") == origin
        assert ("hit" in answer.headers["cache-status"]) == bool(vary)
        assert "hit" in client.get("/").headers["cache-status"]


@pytest.mark.parametrize("is_outer", [True, False], ids=["further out", "further in"])
def test_a_page_that_looks_at_the_session_is_rendered_for_nobody(
    settings: Settings, is_outer: bool
) -> None:
    """A page that looks at the session is kept as nobody's, one that changes it is not kept, in either order."""
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    app, pages = FastAPI(lifespan=room.lifespan), Pages(room)

    @app.get("/hello")
    @pages.page(ttl=60)
    async def hello(session: CurrentSession) -> str:
        return str(session.user_id)

    @app.get("/all")
    @pages.page(ttl=60, sessions=True)
    async def for_all(request: Request) -> str:
        return str(request.session.get("name"))

    @app.get("/begin")
    @pages.page(ttl=60)
    async def begin(request: Request) -> str:
        request.session["name"] = "ann"
        return "begun"

    def limits() -> None:
        app.add_middleware(StillroomMiddleware, room=room)

    for step in [lambda: pages.install(app), limits][:: 1 if is_outer else -1]:
        step()
    with TestClient(app) as client:
        for expected in ("stored", "hit"):
            answer = client.get("/hello")
            assert (answer.status_code, answer.json()) == (200, "None")
            assert expected in answer.headers["cache-status"]
        assert "bypass" in client.get("/all").headers["cache-status"]
        begun = [client.get("/begin").headers.get("set-cookie") for _ in range(2)]
        assert begun[0]
        assert not begun[1]
        assert client.get("/all").json() == "ann"


def test_a_template_that_a_view_adds_as_a_tag_is_refused(settings: Settings) -> None:
    """A view that adds a page's own template as a tag, its f forgotten, fails where that is written.

    Nobody invalidates such a tag: the page would stay as it is until it ends.
    """
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        flask, pages = Flask("shop"), Pages(room)
        pages.install(flask)

        @flask.get("/products/<int:number>")
        @pages.page(tags=["product:{number}"])
        def product(number: int) -> str:
            tag_page("product:{number}")
            return str(number)

        flask.testing = True
        with pytest.raises(InvalidKey, match=r"did you mean f'product:\{number\}'"):
            flask.test_client().get(PRODUCT)
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    fastapi, own = FastAPI(lifespan=room.lifespan), Pages(room)
    own.install(fastapi)

    @fastapi.get("/products/{number}")
    @own.page(tags=["product:{number}"])
    async def product_async(number: int) -> int:
        tag_page("product:{number}")
        return number

    with (
        TestClient(fastapi) as client,
        pytest.raises(InvalidKey, match=r"did you mean f'product:\{number\}'"),
    ):
        client.get(PRODUCT)


def test_a_visitor_may_ask_for_what_looks_like_a_template(settings: Settings) -> None:
    """A page that is asked for with braces, and tags itself with that, is a page as any other."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        flask, pages = Flask("shop"), Pages(room)
        pages.install(flask)

        @flask.get("/found/<text>")
        @pages.page(tags=["found:{text}"])
        def found(text: str) -> str:
            tag_page(f"found:{text}")
            return text

        for status in ("fwd=miss; stored", "hit"):
            answer = flask.test_client().get("/found/{text}")
            assert (answer.status_code, answer.text) == (200, "{text}")
            assert status in answer.headers["cache-status"]


def test_a_page_whose_tag_is_too_long_is_given_and_not_kept(settings: Settings) -> None:
    """A page that its view tags with what a visitor searches for is given, and not kept if that can be no tag."""
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    fastapi, own = FastAPI(lifespan=room.lifespan), Pages(room)
    own.install(fastapi)

    @fastapi.get("/found")
    @own.page(query=["text"])
    async def found_async(text: str) -> int:
        tag_page(f"found:{text}")
        return len(text)

    flask = Flask("shop")
    with Stillroom(settings, dispatch=NoDispatch()) as sync, TestClient(fastapi) as client:
        pages = Pages(sync)
        pages.install(flask)

        @flask.get("/found")
        @pages.page(query=["text"])
        def found() -> str:
            tag_page(f"found:{flask_request.args['text']}")
            return str(len(flask_request.args["text"]))

        for caller in (client, flask.test_client()):
            for _ in range(2):
                answer: Any = caller.get("/found?text=" + "x" * 3_000)
                assert (answer.status_code, answer.text) == (200, "3000")
                assert "bypass" in answer.headers["cache-status"]
    with pytest.raises(InvalidKey, match="a str, not int"):
        tag_page(7)  # type: ignore[arg-type]


def tenant_of(x_tenant: Annotated[str | None, Header()] = None) -> str | None:
    return x_tenant


class Client:
    """What a view knows of its client, as a class that is a dependency."""

    def __init__(
        self, tenant: str | None = Depends(tenant_of), agent: str = Header("", alias="User-Agent")
    ):
        self.tenant, self.agent = tenant, agent


class Common(BaseModel):
    """Headers that several views take."""

    save_data: bool = False
    trace: str = Field("", alias="X-Trace")


def by_annotation(accept_language: Annotated[str | None, Header()] = None) -> None: ...
def by_default(lang: str = Header("en", alias="X-Lang")) -> None: ...
def by_dependency(tenant: str | None = Depends(tenant_of)) -> None: ...
def by_class(client: Annotated[Client, Depends()]) -> None: ...
def by_cookie(theme: Annotated[str, Cookie()] = "light") -> None: ...
def by_token(authorization: Annotated[str, Header()] = "") -> None: ...
def by_model(common: Annotated[Common, Header()]) -> None: ...
def by_model_as_it_is(
    common: Annotated[Common, Header(convert_underscores=False)],
) -> None: ...
def by_host(host: Annotated[str, Header()]) -> None: ...
def by_nothing(id: int, q: str = "", request: Request = None) -> None: ...  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("view", "options", "told"),
    [
        (by_annotation, {}, ["header accept-language"]),
        (by_annotation, {"vary": ["Accept-Language"]}, []),
        (by_default, {}, ["header X-Lang"]),
        (by_dependency, {"vary": ["X-Lang"]}, ["header x-tenant"]),
        (by_class, {}, ["header x-tenant", "header User-Agent"]),
        (by_class, {"vary": ["user-agent"]}, ["header x-tenant"]),
        (by_cookie, {}, []),
        (by_cookie, {"sessions": True}, ["cookie theme"]),
        (by_token, {}, []),
        (by_token, {"sessions": True}, ["header authorization"]),
        (by_model, {}, ["header save-data", "header X-Trace"]),
        (by_model, {"vary": ["Save-Data", "X-Trace"]}, []),
        (by_model_as_it_is, {}, ["header save_data", "header X-Trace"]),
        (by_host, {}, []),
        (by_nothing, {}, []),
    ],
)
def test_what_a_page_is_rendered_without_is_told(
    room: Stillroom, caplog: pytest.LogCaptureFixture, view: Any, options: Any, told: list[str]
) -> None:
    """A header or a cookie that a view of FastAPI takes, and its pages are rendered without, is told at the start.

    Everybody would get the page of who sends none. Who sends a cookie goes past the cache, unless sessions=True.
    """
    Pages(room).page(name="p", **options)(view)
    takes = "the view of the page p takes the "
    found = [line.removeprefix(takes).partition(",")[0] for line in caplog.messages]
    assert found == told


def test_a_forgotten_install_is_told_at_the_start(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A page that no app has installed is never cached: the log says so when the app of the room starts."""
    room = AsyncStillroom(settings)
    app, pages = FastAPI(lifespan=room.lifespan), Pages(room)

    @app.get("/about")
    @pages.page(ttl=60, name="about")
    async def about() -> str:
        return "about"

    with TestClient(app) as client:
        assert "cache-status" not in client.get("/about").headers
    assert "the page about is cached nowhere: Pages.install(app) was not called" in caplog.messages
    caplog.clear()
    app.middleware_stack = None  # as in an app that has not started
    pages.install(app)
    with TestClient(app) as client:
        assert "cache-status" in client.get("/about").headers
    assert not [told for told in caplog.messages if "cached nowhere" in told]


# Classes


def test_a_page_that_no_route_of_the_app_leads_to_is_told(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A page of a mounted app, or of POST alone, is cached nowhere, and told with the first request."""

    def page(pages: Pages[Any], name: str) -> Any:
        def view() -> dict[str, str]:
            return {}

        view.__name__ = name
        return pages.page(ttl=60, name=name)(view)

    room = AsyncStillroom(settings, dispatch=NoDispatch())
    pages, inners = Pages(room), Pages(room)
    fastapi, inner, router = FastAPI(), FastAPI(), APIRouter()
    pages.install(fastapi)
    inners.install(inner)
    router.get("/kept")(page(pages, "kept"))
    fastapi.include_router(router, prefix="/r")
    inner.get("/lost")(page(pages, "lost"))
    inner.get("/own")(page(inners, "own"))
    fastapi.mount("/in", inner)
    fastapi.post("/posted")(page(pages, "posted"))
    client = TestClient(fastapi)
    said = [
        client.get(path).headers.get("cache-status") for path in ("/r/kept", "/in/own", "/in/lost")
    ]
    assert said[:2] == ["stillroom; fwd=miss; stored"] * 2
    flask, theirs = Flask("unreached"), Pages(Stillroom(settings, dispatch=NoDispatch()))
    theirs.install(flask)
    flask.post("/posted")(page(theirs, "flasks"))
    flask.get("/kept")(page(theirs, "flasks_kept"))
    assert flask.test_client().get("/kept").headers["cache-status"].endswith("stored")
    nowhere = [one for one in caplog.messages if "is cached nowhere" in one]
    assert [one.split()[2] for one in nowhere] == ["lost", "posted", "flasks"]


def test_a_page_below_a_mount_with_parameters_goes_to_its_view(settings: Settings) -> None:
    """An app that is mounted with parameters answers itself: its view may look at them, and no page has them."""
    pages = Pages(AsyncStillroom(settings, dispatch=NoDispatch()))

    @pages.page(ttl=60)
    async def home(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.path_params["tenant"])

    inner = Starlette(routes=[Route("/home", home)])
    pages.install(inner)
    outer = [Mount("/t/{tenant}", inner), Host("{tenant}.shop.example", inner)]
    client = TestClient(Starlette(routes=outer))
    for address in ("/t/ann/home", "/t/bob/home", "http://cem.shop.example/home"):
        answer = client.get(address)
        assert answer.text in address.replace(".", "/").split("/")
        assert answer.headers["cache-status"] == "stillroom; fwd=bypass"


def test_a_page_that_another_app_of_the_factory_has_is_not_told(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Apps that a factory makes, as for tests, may leave a page out. One that none of them has is told once."""
    pages = Pages(Stillroom(settings, dispatch=NoDispatch()))
    views = {}
    for name in ("home", "admin", "lost"):
        views[name] = pages.page(ttl=60, name=name)(lambda name=name: {"name": name})
    for shown in (["home", "admin"], ["home"], ["home"]):
        app = Flask("made")
        pages.install(app)
        for name in shown:
            app.get(f"/{name}", endpoint=name)(views[name])
        assert app.test_client().get("/home").status_code == 200
    nowhere = [one for one in caplog.messages if "is cached nowhere" in one]
    assert [one.split()[2] for one in nowhere] == ["lost"]


def test_pages_of_classes(settings: Settings) -> None:
    """A page may stand on a class of endpoints, or on its method `get`; its other methods are called each time."""
    calls: list[str] = []
    flask, starlette = flask_with_classes(settings, calls), starlette_with_classes(settings, calls)
    for client in (flask, starlette):
        calls.clear()
        for path in ("/method", "/class"):
            said = [client.get(path).headers["Cache-Status"] for _ in range(2)]
            assert said == ["stillroom; fwd=miss; stored", "stillroom; hit"]
        assert [client.post("/method").status_code for _ in range(2)] == [200, 200]
        assert calls == ["get", "whole", "post", "post"]


def flask_with_classes(settings: Settings, calls: list[str]) -> Any:
    app, pages = Flask("classes"), Pages(Stillroom(settings, dispatch=NoDispatch()))

    class Method(MethodView):
        @pages.page(ttl=60, name="flask_method")
        def get(self) -> str:
            calls.append("get")
            return "got"

        def post(self) -> str:
            calls.append("post")
            return "posted"

    @pages.page(ttl=60, name="flask_class")
    class Whole(MethodView):
        def get(self) -> str:
            calls.append("whole")
            return "got"

    app.add_url_rule("/method", view_func=Method.as_view("method"))
    app.add_url_rule("/class", view_func=Whole.as_view("class"))
    pages.install(app)
    return app.test_client()


def starlette_with_classes(settings: Settings, calls: list[str]) -> Any:
    pages = Pages(AsyncStillroom(settings, dispatch=NoDispatch()))

    class Method(HTTPEndpoint):
        @pages.page(ttl=60, name="starlette_method")
        async def get(self, request: Request) -> PlainTextResponse:
            calls.append("get")
            return PlainTextResponse("got")

        async def post(self, request: Request) -> PlainTextResponse:
            calls.append("post")
            return PlainTextResponse("posted")

    @pages.page(ttl=60, name="starlette_class")
    class Whole(HTTPEndpoint):
        async def get(self, request: Request) -> PlainTextResponse:
            calls.append("whole")
            return PlainTextResponse("got")

    app = Starlette(routes=[Route("/method", Method), Route("/class", Whole)])
    pages.install(app)
    return TestClient(app)


def test_what_no_page_stands_on(settings: Settings) -> None:
    """A bound method, a partial, and what can't be called are refused as pages where they are written."""
    page = Pages(Stillroom(settings, dispatch=NoDispatch())).page(ttl=60)
    for given in (settings.model_dump, partial(str, 5), "view"):
        with pytest.raises(InvalidArgument, match="is put on a function or a class"):
            page(given)  # type: ignore[arg-type]
