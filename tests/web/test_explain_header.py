"""A response says of each read of the cache what it was, and why, to who has the health token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import http_sfv
import pytest
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import path
from fastapi import FastAPI
from flask import Flask
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.cache.body import CacheBody
from stillroom.cache.near import Store
from stillroom.cache.traced import MOST, Read, Trace
from stillroom.web.asgi import StillroomMiddleware as Asgi
from stillroom.web.django import room as room_of_django
from stillroom.web.explain import LONGEST, NAME, ExplainASGI, ExplainWSGI, written
from stillroom.web.flask import StillroomLimits
from stillroom.web.pages import Pages
from stillroom.web.wsgi import StillroomMiddleware as Wsgi
from tests.support.crowd import PATIENT
from tests.support.web import Reply, ask, serving_asgi, serving_wsgi

TOKEN = "t" * 32
WITH_TOKEN = {NAME: TOKEN}
SECRET = {"explain_header": True, "health_token": TOKEN}
Told = list[tuple[str, dict[str, Any]]]
Ask = Callable[[str], Told]


class Shop:
    """The loaders of one app, for either face."""

    def __init__(self, room: Any) -> None:
        self.room = room
        cached = room.cache.cached
        self.product = cached("product:{id}", tags=["products"], ttl=600, swr=600)(_value)
        self.price = cached("price:{id}", ttl=600, near=30)(_price)
        self.name = cached("name:{id}", ttl=600, memo=True)(_name)


def _value(id: int) -> int:
    return id


def _price(id: int) -> int:
    return id


def _name(id: str) -> str:
    return id


READS: dict[str, Callable[[Shop], list[Any]]] = {
    "/page": lambda shop: [shop.product(7)],
    "/near": lambda shop: [shop.price(1), shop.price(1)],
    "/memo": lambda shop: [shop.name("a"), shop.name("a")],
    "/two": lambda shop: [shop.product(7), shop.product(7)],
    "/many": lambda shop: [shop.room.cache.get_many(["product:7", "none"])],
    "/typed": lambda shop: [shop.room.cache.get("product:7", dict)],
    "/hostile": lambda shop: [shop.name(f'{n}"\\\r\n\x1bü' + "k" * 300) for n in range(80)],
    "/nothing": lambda shop: [],
}


async def read(shop: Shop, path: str) -> str:
    return str([await one for one in READS[path](shop)])


def flask_app(room: Stillroom, around: str) -> Any:
    app, shop = Flask("explained"), Shop(room)
    for url, reads in READS.items():
        app.add_url_rule(url, url, lambda reads=reads: str(reads(shop)))
    if around == "limits":
        StillroomLimits(app, room)
    elif around == "init_app":
        room.init_app(app)
    elif around == "debug":
        app.debug = True
        room.init_app(app)
        StillroomLimits(app, room)
    return app


def asgi_app(kind: str, room: AsyncStillroom) -> Any:
    shop = Shop(room)

    async def view(request: Request) -> PlainTextResponse:
        return PlainTextResponse(await read(shop, request.url.path))

    routes = [Route(url, view) for url in READS]
    if kind == "fastapi":
        app: Any = FastAPI()
        app.router.routes.extend(routes)
    else:
        app = Starlette(routes=routes, debug=kind == "debug")
    return app


def view_of_django(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(READS[request.path](shop_of(room_of_django()))))


@lru_cache
def shop_of(room: Stillroom) -> Shop:
    """Return the loaders of Django's room, which are registered once."""
    return Shop(room)


class DjangosUrls:
    urlpatterns = [path(url[1:], view_of_django) for url in READS]  # noqa: RUF012 - as Django has it


@contextmanager
def serving_django(kind: str, settings: Settings) -> Iterator[int]:
    from django.core.handlers.asgi import ASGIHandler
    from django.core.handlers.wsgi import WSGIHandler

    import tests.web.test_django  # noqa: F401 - configures Django, once for all tests

    given = PATIENT | {"redis_url": settings.redis_url, "explain_header": settings.explain_header}
    if settings.health_token is not None:
        given["health_token"] = settings.health_token.get_secret_value()
    middleware = [
        "stillroom.web.django.middleware.SessionMiddleware",
        "stillroom.web.django.limits.LimitsMiddleware",
    ]
    changes = {"STILLROOM": given, "MIDDLEWARE": middleware, "ROOT_URLCONF": DjangosUrls}
    with override_settings(**changes, DEBUG=kind == "django-debug"):
        try:
            if kind == "django-asgi":
                other = AsyncStillroom(settings, dispatch=NoDispatch())
                with serving_asgi(lambda _: ASGIHandler(), other) as port:
                    yield port
            else:
                with serving_wsgi(WSGIHandler()) as port:
                    yield port
        finally:
            room_of_django().close()


WSGI: dict[str, Callable[[Stillroom], Any]] = {
    "flask": lambda room: flask_app(room, "limits"),
    "flask-init": lambda room: flask_app(room, "init_app"),
    "wsgi": lambda room: Wsgi(flask_app(room, "nothing"), room),
    "wsgi-alone": lambda room: ExplainWSGI(flask_app(room, "nothing"), room),
    "flask-debug": lambda room: flask_app(room, "debug"),
}
ASGI: dict[str, Callable[[AsyncStillroom], Any]] = {
    "fastapi": lambda room: _added(asgi_app("fastapi", room), Asgi, room),
    "starlette": lambda room: Asgi(asgi_app("starlette", room), room),
    "asgi-alone": lambda room: _added(asgi_app("fastapi", room), ExplainASGI, room),
    "starlette-debug": lambda room: _added(asgi_app("debug", room), Asgi, room),
}
DEBUG = ["flask-debug", "starlette-debug", "django-debug"]
ALL = [*WSGI, *ASGI, "django", "django-asgi"]
KINDS = [kind for kind in ALL if kind not in DEBUG]


def _added(app: Any, middleware: Any, room: Any) -> Any:
    app.add_middleware(middleware, room=room)
    return app


@contextmanager
def serving(kind: str, settings: Settings) -> Iterator[int]:
    """Serve an app on real HTTP and yield the port."""
    if kind.startswith("django"):
        with serving_django(kind, settings) as port:
            yield port
    elif kind in WSGI:
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            with serving_wsgi(WSGI[kind](room)) as port:
                yield port
    else:
        room_of_loop = AsyncStillroom(settings, dispatch=NoDispatch())
        with serving_asgi(ASGI[kind], room_of_loop) as port:
            yield port


@pytest.fixture
def on(settings: Settings) -> Settings:
    """Return settings in which the header is on."""
    return Settings(**{"redis_url": settings.redis_url} | PATIENT | SECRET)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def told(reply: Reply) -> Told:
    """Return what a response tells of each read, by an independent parser."""
    found = http_sfv.List()
    found.parse(reply.one(NAME).encode())
    return [(str(item.value), dict(item.params)) for item in found]


def test_each_read_is_told_with_its_reason(kind: str, on: Settings, room: Stillroom) -> None:
    """A response tells of each read whether it was a hit, stale, a miss or near, and why."""
    with serving(kind, on) as port:

        def reads(path: str = "/page") -> Told:
            return told(ask(port, path, headers=WITH_TOKEN))

        assert reads() == [("product:7", {"miss": True, "why": "never", "loader": "_value"})]
        hit = ("product:7", {"hit": True, "why": "fresh", "loader": "_value"})
        assert reads() == [hit]
        assert reads("/two") == [hit, hit]
        room.cache.invalidate_by_tag("products", soft=True)
        (soft,) = reads()
        assert soft[1] | {"stale": True, "why": "soft", "by": "products"} == soft[1]
        room.cache.invalidate_by_tag("products")
        (dead,) = reads()
        assert dead[1] | {"miss": True, "why": "tag", "by": "products"} == dead[1]
        many = reads("/many")
        assert [(key, next(iter(facts))) for key, facts in many] == [
            ("product:7", "hit"),
            ("none", "miss"),
        ]
        reads("/near"), reads("/near")  # is loaded, and is kept
        assert [next(iter(facts)) for _, facts in reads("/near")] == ["near", "near"]
        reads("/memo")
        again = "fresh" if kind.endswith("alone") else "request"  # it begins no request of the room
        assert [facts["why"] for _, facts in reads("/memo")] == ["fresh", again]
        (typed,) = reads("/typed")
        assert typed[1]["why"] == "unreadable"


def test_who_has_no_token_is_told_nothing(kind: str, on: Settings) -> None:
    """A request without the token, or with another one, is answered as ever."""
    with serving(kind, on) as port:
        for headers in (
            {},
            {NAME: "1"},
            {NAME: TOKEN[:-1]},
            {NAME: ""},
            {"Authorization": f"Bearer {TOKEN}"},
        ):
            assert ask(port, "/page", headers=headers).all(NAME) == []


def test_a_token_may_have_letters_of_any_kind(kind: str, on: Settings) -> None:
    """A token with letters outside of ASCII opens it in UTF-8, as it opens /health."""
    token = "ö" * 32
    written = {NAME: token.encode().decode("latin-1")}  # what curl sends
    with serving(kind, on.model_copy(update={"health_token": SecretStr(token)})) as port:
        assert ask(port, "/nothing", headers=written).one(NAME) == "nothing"


def test_it_is_off_by_default(kind: str, settings: Settings) -> None:
    """Without the setting the token opens nothing, and the room is made of the classes that note nothing."""
    given = {"redis_url": settings.redis_url, "health_token": TOKEN}
    off = Settings(**given | PATIENT)
    with serving(kind, off) as port:
        assert ask(port, "/page", headers=WITH_TOKEN).all(NAME) == []
    with Stillroom(off, dispatch=NoDispatch()) as room:
        assert type(room._cache_body) is CacheBody
        assert type(room._cache_body.copies) is Store


@pytest.mark.parametrize("kind", DEBUG)
def test_an_app_in_debug_mode_tells_everybody(kind: str, on: Settings) -> None:
    """In an app's debug mode no token is needed, but not in production."""
    given = {"redis_url": on.redis_url, "explain_header": True}
    with serving(kind, Settings(**given | PATIENT)) as port:
        assert told(ask(port, "/page"))[0][0] == "product:7"
    in_production = given | {
        "production": True,
        "session_peppers": ["p" * 40],
        "health_token": TOKEN,
    }
    if not kind.startswith("django"):
        with serving(kind, Settings(**in_production | PATIENT)) as port:
            assert ask(port, "/page").all(NAME) == []
            assert told(ask(port, "/page", headers=WITH_TOKEN))


def test_no_shared_cache_keeps_what_was_told(kind: str, on: Settings) -> None:
    """A response that tells is private, and one without reads says so."""
    with serving(kind, on) as port:
        reply = ask(port, "/nothing", headers=WITH_TOKEN)
        assert reply.one(NAME) == "nothing"
        assert "private" in reply.one("cache-control")


def test_hostile_keys_make_one_bounded_header(kind: str, on: Settings) -> None:
    """Many long keys with line breaks, quotes and other scripts make one header of bounded length."""
    with serving(kind, on) as port:
        reply = ask(port, "/hostile", headers=WITH_TOKEN)
    (value,) = reply.all(NAME)
    assert value.isascii()
    assert value.isprintable()
    assert len(value) <= LONGEST
    items = told(reply)
    last, facts = items[-1]
    assert last == "others"
    assert facts["n"] == 80 - (len(items) - 1)


def test_a_page_that_is_stored_tells_nobody(on: Settings) -> None:
    """A page that was rendered for a request with the token is stored without the header."""
    with Stillroom(on, dispatch=NoDispatch()) as room:
        app, pages = flask_app(room, "limits"), Pages(room)
        pages.page(ttl=60)(app.view_functions["/page"])
        pages.install(app)
        with serving_wsgi(app) as port:
            first = ask(port, "/page", headers=WITH_TOKEN)
            again = ask(port, "/page")
        assert (first.text, again.all(NAME)) == ("[7]", [])
        assert again.one("cache-status") == "stillroom; hit"


def test_while_redis_is_away_reads_are_told_as_away(server: Any) -> None:
    """A read that could not ask Redis is told with the reason."""
    away = Settings(**{"redis_url": "redis://127.0.0.1:1"} | PATIENT | SECRET)
    with Stillroom(away, dispatch=NoDispatch()) as room:
        with serving_wsgi(ExplainWSGI(flask_app(room, "nothing"), room)) as port:
            ((key, facts),) = told(ask(port, "/page", headers=WITH_TOKEN))
    assert (key, facts["away"], facts["why"]) == ("product:7", True, "refused")


def test_more_reads_than_are_noted_are_counted() -> None:
    """Reads past the limit are counted as left out."""
    trace = Trace()
    for n in range(MOST + 9):
        trace.note(b"%d" % n, Read(str(n), "hit", "fresh"))
    assert written(trace).endswith("others;n=9")
