"""However a path is spelled: what reaches an endpoint was charged that endpoint's limits.

Requests are made as servers make them of a request line (uvicorn, gunicorn), and handed to the frameworks' own
routing. Each endpoint says who it is, and each response which limits were charged.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable, Iterator
from itertools import cycle
from random import Random
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path as django_path
from django.urls import re_path
from fastapi import Depends, FastAPI
from flask import Flask
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.routing import Route as StarletteRoute

import tests.web.test_django  # noqa: F401 - configures Django
from stillroom import AsyncStillroom, Limit, NoDispatch, Route, Routes, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.web import fastapi as on_fastapi
from stillroom.web.asgi import StillroomMiddleware as Asgi
from stillroom.web.asgi_health import HealthASGI
from stillroom.web.django import room as room_of_django
from stillroom.web.django.limits import limited as on_django
from stillroom.web.flask import StillroomLimits
from stillroom.web.flask import limited as on_flask
from stillroom.web.starlette import limited as on_starlette
from stillroom.web.wsgi import StillroomMiddleware as Wsgi
from tests.support.crowd import PATIENT

pytestmark = pytest.mark.filterwarnings("ignore:The `root_path` parameter")
MANY = 1_000_000
REQUESTS = {True: 1_500, False: 300}  # in full and in short
REACHING = {True: 40, False: 10}  # so many spellings at least reach an endpoint
# name → template, in the table's words
TEMPLATES = {
    "login": "/login",
    "search": "/search/{words}",
    "page": "/page/{id}.html",
    "files": "/files/{path:path}",
    "admin": "/admin/users/{id}",
}
LIMITS = {name: Limit(name, MANY, 60) for name in TEMPLATES}
TABLE = Routes(
    [Route("/free", []), *[Route(text, [LIMITS[name]]) for name, text in TEMPLATES.items()]],
    default=[Limit("default", MANY, 60)],
)
Ask = Callable[[str, str], tuple[str | None, set[str]]]

PATHS = [
    *("/login", "/search/tea", "/page/7.html", "/files/a/b.css", "/admin/users/7", "/free", "/"),
    *("/login/", "/search/", "/files/", "/LOGIN", "/search/x/y"),
    *(
        "/api/login",
        "/api/search/tea",
        "/api/page/7.html",
        "/api/files/a/b.css",
        "/api/admin/users/7",
    ),
]
MARKS = [
    *(
        "%0A",
        "%0D%0A",
        "%00",
        "%20",
        "%09",
        "%3F",
        "%23",
        "?x=1",
        "#x",
        ";",
        ";a=1",
        "%3B",
        "%2F",
        "%5C",
        "\\",
    ),
    *(
        "/",
        "//",
        "/.",
        "/..",
        "/./",
        "/../",
        "/x/../",
        "%2e%2e/",
        "%252F",
        "%250A",
        "%25",
        "%C3%A9",
        "%E2%80%A8",
    ),
    *(
        "%FF",
        "é",
        "\u212a",
        "%C5%BF",
        ".html",
        ".html%0A",
        "/api",
        "/free",
        "/login",
        "%2Flogin",
        "{id}",
        "&",
        "=",
        "+",
    ),
]


def spelling(random: Random) -> str:
    """Draw a path that somebody has played with."""
    path = random.choice(PATHS)
    for _ in range(random.choice([0, 1, 1, 2, 2, 3])):
        at = random.randrange(len(path) + 1)
        act = random.choice(["insert", "insert", "encode", "case", "twice"])
        if act == "insert":
            path = path[:at] + random.choice(MARKS) + path[at:]
        elif at < len(path) and path[at] != "%":
            new = {"encode": f"%{ord(path[at]) & 255:02x}", "case": path[at].swapcase()}
            path = path[:at] + new.get(act, f"%25{ord(path[at]) & 255:02X}") + path[at + 1 :]
    return path if path.startswith("/") else f"/{path}"


def charged(headers: Any) -> set[str]:
    """Return the limits that a response reports."""
    named = {name.lower(): value for name, value in headers}
    return {
        one.partition('"')[2].partition('"')[0]
        for one in named.get("ratelimit-policy", "").split(",")
    }


# The frameworks, each with the same endpoints


def starlette_app(on: Any) -> Any:
    def endpoint(name: str) -> Any:
        async def reached(request: Request) -> Response:
            return Response(name, headers={"X-Reached": name})

        return on(name)(reached)

    methods = ["GET", "POST", "OPTIONS"]
    routes = [
        StarletteRoute(text, endpoint(name), methods=methods) for name, text in TEMPLATES.items()
    ]
    return Starlette(routes=[StarletteRoute("/free", endpoint("free")), *routes])


def fastapi_app(on: Any, **options: Any) -> FastAPI:
    app = FastAPI(**options)
    for name, text in {"free": "/free", **TEMPLATES}.items():

        def maker(name: str = name) -> Any:
            async def reached() -> Response:
                return Response(name, headers={"X-Reached": name})

            return reached

        app.add_api_route(text, maker(), methods=["GET", "POST"], dependencies=on(name))
    return app


def flask_app(on: Any) -> Flask:
    app = Flask("fuzzed", static_folder=None)
    words = {"{words}": "<words>", "{id}": "<id>", "{path:path}": "<path:path>"}
    for name, text in {"free": "/free", **TEMPLATES}.items():
        written = text
        for ours, theirs in words.items():
            written = written.replace(ours, theirs)

        def reached(name: str = name, **_: Any) -> Any:
            return name, 200, {"X-Reached": name}

        app.add_url_rule(written, name, on(name)(reached), methods=["GET", "POST"])
    return app


def django_urls(on: Any) -> list[Any]:
    def view(name: str) -> Any:
        return on(name)(lambda request, **_: HttpResponse(name, headers={"X-Reached": name}))

    return [
        django_path("free", view("free")),
        django_path("login", view("login")),
        re_path(r"^search/(?P<words>[^/]+)$", view("search")),
        django_path("page/<id>.html", view("page")),
        django_path("files/<path:path>", view("files")),
        re_path(r"(?i)^admin/users/(?P<id>\w+)/?$", view("admin")),
    ]


# What servers make of a request line


def by_asgi(
    app: Any, loop: asyncio.AbstractEventLoop, root: str = "", *, prepends: bool = False
) -> Ask:
    """Make the request as uvicorn does; with `prepends` its --root-path goes in front of the path."""

    def ask(method: str, raw: str) -> tuple[str | None, set[str]]:
        target = quote(raw, safe="%/?#;&=+\\{}~")
        path = unquote(target.partition("?")[0])
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": root + path if prepends else path, "raw_path": target.encode(), "root_path": root,
            "query_string": target.partition("?")[2].encode(), "headers": [(b"host", b"x")],
            "client": ("203.0.113.9", 1), "server": ("x", 80),
        }  # fmt: skip
        sent: list[Any] = []

        body = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            return body.pop() if body else await asyncio.Future()

        async def send(message: Any) -> None:
            sent.append(message)

        loop.run_until_complete(app(scope, receive, send))
        headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in sent[0]["headers"]]
        return dict(headers).get("x-reached") or dict(headers).get("X-Reached"), charged(headers)

    return ask


def by_wsgi(app: Any, root: str = "") -> Ask:
    """Make the request as gunicorn does."""

    def ask(method: str, raw: str) -> tuple[str | None, set[str]]:
        target = quote(raw, safe="%/?#;&=+\\{}~")
        environ = {
            "REQUEST_METHOD": method, "SCRIPT_NAME": root, "SERVER_NAME": "x", "SERVER_PORT": "80",
            "PATH_INFO": unquote_to_bytes(target.partition("?")[0]).decode("latin-1"),
            "QUERY_STRING": target.partition("?")[2], "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_HOST": "x",
            "REMOTE_ADDR": "203.0.113.9", "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(),
            "wsgi.url_scheme": "http", "wsgi.version": (1, 0), "wsgi.multithread": False,
            "wsgi.multiprocess": False, "wsgi.run_once": False,
        }  # fmt: skip
        said: list[Any] = []
        body = app(environ, lambda status, headers, *_: said.append(headers) or (lambda _: None))
        b"".join(body)
        if hasattr(body, "close"):
            body.close()
        return {n.lower(): v for n, v in said[0]}.get("x-reached"), charged(said[0])

    return ask


def nothing(_: str) -> Callable[[Any], Any]:
    return lambda endpoint: endpoint


def own(limited: Any) -> Callable[[str], Any]:
    """Give each endpoint its own limit, except the free one."""
    return lambda name: limited(LIMITS[name]) if name in LIMITS else lambda endpoint: endpoint


def own_dependency(name: str) -> list[Any]:
    return [Depends(on_fastapi.limited(LIMITS[name]))] if name in LIMITS else []


def no_dependency(_: str) -> list[Any]:
    return []


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with asyncio.Runner() as runner:
        yield runner.get_loop()


@pytest.fixture(scope="module")
def rooms(
    stillroom_server: EmbeddedServer, loop: Any
) -> Iterator[tuple[Stillroom, AsyncStillroom]]:
    settings = Settings(**{"redis_url": stillroom_server.url} | PATIENT)
    room, other = (
        Stillroom(settings, dispatch=NoDispatch()),
        AsyncStillroom(settings, dispatch=NoDispatch()),
    )
    yield room, other
    room.close()
    loop.run_until_complete(other.close())


def in_a_closure(app: Any) -> Any:
    """Return a middleware that is a function, as many apps have one."""

    async def passing(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return passing


def cutting_anywhere(app: Any) -> Any:
    """Return a middleware that takes a root path off as Litestar and Quart do, wherever it stands in the path."""

    async def passing(scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].split(scope["root_path"], 1)[-1]
        path = "/" + re.sub("/+", "/", path).strip("/")
        await app({**scope, "path": path, "root_path": ""}, receive, send)

    return passing


def with_table(app: Any, room: AsyncStillroom) -> Any:
    app.add_middleware(Asgi, room=room, routes=TABLE, sessions=False)
    return app


def make(name: str, rooms: Any, loop: Any) -> Ask:
    room, other = rooms
    around = {"routes": TABLE, "sessions": False}
    makers: dict[str, Callable[[], Ask]] = {
        "starlette, table": lambda: by_asgi(with_table(starlette_app(nothing), other), loop),
        "starlette wrapped, table": lambda: by_asgi(
            Asgi(starlette_app(nothing), other, **around), loop
        ),
        "starlette mounted, table": lambda: by_asgi(
            Starlette(routes=[Mount("/api", with_table(starlette_app(nothing), other))]), loop
        ),
        "fastapi root_path, table": lambda: by_asgi(
            with_table(fastapi_app(no_dependency, root_path="/api"), other), loop
        ),
        "fastapi root_path wrapped, table": lambda: by_asgi(
            Asgi(fastapi_app(no_dependency, root_path="/api"), other, **around), loop
        ),
        "fastapi root_path mounted, table": lambda: by_asgi(
            Asgi(
                Starlette(routes=[Mount("/", fastapi_app(no_dependency, root_path="/api"))]),
                other,
                **around,
            ),
            loop,
        ),
        "fastapi root_path behind others, table": lambda: by_asgi(
            Asgi(
                HealthASGI(in_a_closure(fastapi_app(no_dependency, root_path="/api")), other),
                other,
                **around,
            ),
            loop,
        ),
        "uvicorn --root-path, table": lambda: by_asgi(
            with_table(fastapi_app(no_dependency), other), loop, "/api", prepends=True
        ),
        "root_path not in the path, table": lambda: by_asgi(
            with_table(starlette_app(nothing), other), loop, "/api"
        ),
        "root_path anywhere, table": lambda: by_asgi(
            Asgi(cutting_anywhere(starlette_app(nothing)), other, **around), loop, "/api"
        ),
        "flask, table": lambda: by_wsgi(Wsgi(flask_app(nothing), room, **around)),
        "flask under a script name, table": lambda: by_wsgi(
            Wsgi(flask_app(nothing), room, **around), "/api"
        ),
        "django, table": lambda: by_wsgi(Wsgi(WSGIHandler(), room, **around)),
        "django under a script name, table": lambda: by_wsgi(
            Wsgi(WSGIHandler(), room, **around), "/api"
        ),
        "django asgi, table": lambda: by_asgi(Asgi(ASGIHandler(), other, **around), loop),
        "django asgi --root-path, table": lambda: by_asgi(
            Asgi(ASGIHandler(), other, **around), loop, "/api", prepends=True
        ),
        "django asgi FORCE_SCRIPT_NAME, table": lambda: by_asgi(
            Asgi(ASGIHandler(), other, **around), loop
        ),
        "starlette, endpoints": lambda: by_asgi(
            Asgi(starlette_app(own(on_starlette)), other, sessions=False), loop
        ),
        "fastapi, endpoints": lambda: by_asgi(
            Asgi(fastapi_app(own_dependency, root_path="/api"), other, sessions=False), loop
        ),
        "flask, endpoints": lambda: by_wsgi(with_extension(flask_app(own(on_flask)), room)),
        "django, endpoints": lambda: by_wsgi(WSGIHandler()),
        "django asgi, endpoints": lambda: by_asgi(ASGIHandler(), loop),
    }
    return makers[name]()


def with_extension(app: Flask, room: Stillroom) -> Flask:
    StillroomLimits(app, room)
    return app


NAMES = [
    "starlette, table", "starlette wrapped, table", "starlette mounted, table", "fastapi root_path, table",
    "fastapi root_path wrapped, table", "fastapi root_path mounted, table",
    "fastapi root_path behind others, table",
    "uvicorn --root-path, table", "root_path not in the path, table", "root_path anywhere, table",
    "flask, table", "flask under a script name, table", "django, table", "django under a script name, table",
    "django asgi, table", "django asgi --root-path, table", "django asgi FORCE_SCRIPT_NAME, table",
    "starlette, endpoints", "fastapi, endpoints",
    "flask, endpoints", "django, endpoints", "django asgi, endpoints",
]  # fmt: skip


class Urls:
    """A module of URLs, as Django takes one."""

    def __init__(self, on: Any) -> None:
        self.urlpatterns = django_urls(on)


@pytest.fixture(params=NAMES)
def asking(
    request: pytest.FixtureRequest, rooms: Any, loop: Any, stillroom_server: Any
) -> Iterator[Ask]:
    """Return a function that asks one server and framework, with limits in the table or on the endpoints."""
    name: str = request.param
    if not name.startswith("django"):
        yield make(name, rooms, loop)
        return
    on_endpoints = "endpoints" in name
    urls = Urls(own(on_django) if on_endpoints else nothing)
    middleware = ["stillroom.web.django.limits.LimitsMiddleware"] if on_endpoints else []
    given = PATIENT | {"redis_url": stillroom_server.url}
    forced = "/api" if "FORCE_SCRIPT_NAME" in name else None
    named = {"ROOT_URLCONF": urls, "MIDDLEWARE": middleware, "FORCE_SCRIPT_NAME": forced}
    with override_settings(**named, STILLROOM=given):
        yield make(name, rooms, loop)
        room_of_django().close()


@pytest.mark.long
def test_whatever_reaches_an_endpoint_was_charged_its_limits(asking: Ask, is_full: bool) -> None:
    """Every request that reaches an endpoint was charged its limits, however path and method are spelled."""
    random = Random(7)
    reached_by: dict[str, set[str]] = {}
    for _ in range(REQUESTS[is_full]):
        path = spelling(random)
        method = random.choice(["GET", "GET", "POST", "HEAD", "OPTIONS", "post"])
        reached, limits = asking(method, path)
        if reached in LIMITS:
            reached_by.setdefault(reached, set()).add(path)
            assert reached in limits, (method, path)
    assert reached_by.keys() == LIMITS.keys(), "the fuzz reaches all endpoints"
    assert sum(map(len, reached_by.values())) >= REACHING[is_full]


@pytest.mark.long
def test_all_known_spellings(asking: Ask, is_full: bool) -> None:
    """All spellings that once led past a limit, and each mark in each place of each path, are charged."""
    methods = cycle([("GET", "POST")] if is_full else [("GET",), ("POST",)])  # in short, in turn
    for path in PATHS:
        places = [1, len(path) // 2, len(path) - 1, len(path)]
        in_turn = cycle([places] if is_full else [[place] for place in places])
        for mark in MARKS:
            for at in next(in_turn):
                spelled = path[:at] + mark + path[at:]
                for method in next(methods):
                    reached, limits = asking(method, spelled)
                    assert reached not in LIMITS or reached in limits, (method, spelled)
