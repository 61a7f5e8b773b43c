"""The route table in front of an app handles other origins, websockets, exemptions and routes that fit nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from django.test import override_settings
from django.urls import include, path, re_path
from fastapi import APIRouter, FastAPI
from flask import Blueprint, Flask, Response, session
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Host, Mount, WebSocketRoute
from starlette.routing import Route as StarletteRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import EnvironBuilder

import redis
import tests.web.test_django  # noqa: F401 - configures Django
from stillroom import (
    AUTH,
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
from stillroom.web import HealthASGI, HealthWSGI, Refusal, starlette_limits
from stillroom.web.asgi import StillroomMiddleware as Asgi
from stillroom.web.carriers import layers
from stillroom.web.cors import ASKS, LEARNED_S, OPEN, Learned, Unanswered
from stillroom.web.django import room as room_of_django
from stillroom.web.django.limits import limited as on_django
from stillroom.web.flask import StillroomLimits, StillroomSessions
from stillroom.web.flask import limited as on_flask
from stillroom.web.gate import Asked
from stillroom.web.known_routes import Misfits
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.starlette import limited, load_session
from stillroom.web.wsgi import StillroomMiddleware as Wsgi
from tests.support.crowd import PATIENT
from tests.support.web import ask, serving_asgi, serving_wsgi
from tests.web.conftest import Serve
from tests.web.test_limits import read

SPA = "https://spa.example"
FROM_SPA = {"Origin": SPA}
PREFLIGHT = FROM_SPA | {"Access-Control-Request-Method": "POST"}
TWO = Limit("two", 2, 60)
TABLE = Routes([], default=[TWO])


def names_of(value: str | None) -> set[str]:
    return {name.strip().lower() for name in (value or "").split(",")}


# Apps with a CORS layer, which stands in front of ours or behind it


def starlette_with_cors(
    room: AsyncStillroom, *, in_front: bool, table: Routes | None = TABLE, **options: Any
) -> Any:
    async def api(request: Any) -> PlainTextResponse:
        return PlainTextResponse("ok", headers={"X-Mine": "1"})

    async def look(request: Any) -> PlainTextResponse:
        await request.scope["stillroom.session"].load()
        return PlainTextResponse("seen")

    app = Starlette(
        routes=[
            StarletteRoute("/api", api, methods=["GET", "POST"]),
            StarletteRoute("/look", look),
        ]
    )
    cors = {"allow_origins": [SPA], "allow_methods": ["*"], "expose_headers": ["X-Mine"]}
    if not in_front:
        app.add_middleware(CORSMiddleware, **cors)
    app.add_middleware(Asgi, room=room, routes=table, **options)
    if in_front:
        app.add_middleware(CORSMiddleware, **cors)
    return app


def flask_with_cors(room: Stillroom, *, table: Routes | None = TABLE, **options: Any) -> Flask:
    app = Flask("cors")
    app.session_interface = StillroomSessions(room)

    @app.after_request
    def cors(response: Response) -> Response:
        response.headers["Access-Control-Allow-Origin"] = SPA
        response.headers["Access-Control-Allow-Headers"] = "content-type"
        response.headers["Vary"] = "Origin"
        return response

    @app.route("/api", methods=["GET", "POST"])
    def api() -> str:
        return "ok"

    @app.get("/look")
    def look() -> str:
        return "seen" if session.get("name") else "not seen"

    app.wsgi_app = Wsgi(app.wsgi_app, room, routes=table, **options)  # type: ignore[method-assign]
    return app


@contextmanager
def serving(kind: str, settings: Settings, **options: Any) -> Iterator[int]:
    if kind == "flask":
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            with serving_wsgi(flask_with_cors(room, **options)) as port:
                yield port
        return
    in_front = kind == "cors in front"
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    with serving_asgi(
        lambda room: starlette_with_cors(room, in_front=in_front, **options), room
    ) as port:
        yield port


KINDS = ["cors in front", "cors behind", "flask"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_preflight_costs_nothing_and_is_never_denied(kind: str, settings: Settings) -> None:
    """A preflight costs nothing and is never denied, before a request and after the last admitted one."""
    with serving(kind, settings) as port:
        for _ in range(5):
            assert ask(port, "/api", "OPTIONS", PREFLIGHT).status == 200
        assert [ask(port, "/api", "POST", FROM_SPA).status for _ in range(3)] == [200, 200, 429]
        for _ in range(5):
            reply = ask(port, "/api", "OPTIONS", PREFLIGHT)
            assert (reply.status, reply.one("access-control-allow-origin")) == (200, SPA)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_may_read_a_refusal_and_how_it_stands(kind: str, settings: Settings) -> None:
    """An allowed origin may read a denial and its headers, whether the CORS layer is in front or behind."""
    with serving(kind, settings) as port:
        replies = [ask(port, "/api", "POST", FROM_SPA) for _ in range(4)]
        assert [reply.status for reply in replies] == [200, 200, 429, 429]
        for reply in replies:
            assert reply.one("access-control-allow-origin") == SPA
            if kind != "cors in front":  # there it is that layer's business: see expose_headers
                exposed = names_of(reply.one("access-control-expose-headers"))
                assert {"ratelimit", "retry-after"} <= exposed
            assert "origin" in names_of(", ".join(reply.all("vary")))
        if kind != "flask":
            stranger = ask(port, "/api", "POST", {"Origin": "https://evil.example"})
            assert stranger.status == 429
            assert stranger.one("access-control-allow-origin") is None
        plain = ask(port, "/api", "POST")
        assert plain.status == 429
        assert plain.one("access-control-expose-headers") is None


def test_what_the_app_exposes_is_kept(settings: Settings) -> None:
    """The app's exposed headers are kept, and ours are added."""
    with serving("cors behind", settings) as port:
        exposed = names_of(ask(port, "/api", "POST", FROM_SPA).one("access-control-expose-headers"))
    assert {"x-mine", "ratelimit"} <= exposed


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_that_cannot_be_read_is_told_to_a_page_too(kind: str) -> None:
    """A 503 for an unreadable session keeps the CORS headers of the app's answer."""
    away = Settings(redis_url="redis://127.0.0.1:1", session_peppers="p" * 40)
    token = "00." + "A" * 43
    with serving(kind, away, table=None) as port:
        reply = ask(port, "/look", headers=FROM_SPA | {"Cookie": f"__Host-sid={token}"})
    assert (reply.status, reply.one("access-control-allow-origin")) == (503, SPA)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, None),
        (FROM_SPA, None),
        ({"Access-Control-Request-Method": "POST"}, None),
        (PREFLIGHT | {"Cookie": "a=b"}, None),
        (PREFLIGHT | {"Authorization": "Basic eDp5"}, None),
        (PREFLIGHT, b"user=ann&password=guess"),
    ],
)
def test_what_only_looks_like_a_preflight_is_charged(
    settings: Settings, headers: dict[str, str], body: bytes | None
) -> None:
    """A request that only looks like a preflight is charged: a browser's has no cookie, credentials or body."""
    import http.client

    with serving("flask", settings) as port:
        statuses = []
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("OPTIONS", "/api", body=body, headers=headers)
            statuses.append(connection.getresponse().status)
            connection.close()
    assert statuses == [200, 200, 429]


def test_an_app_that_is_a_function_is_charged_for_preflights(settings: Settings) -> None:
    """An app without a CORS layer that treats every method alike is charged for preflights."""

    async def guess(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("wrong", 401)(scope, receive, send)

    app = Starlette(routes=[Mount("/guess", app=limited(TWO)(guess))])
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    with serving_asgi(lambda room: Asgi(app, room), room) as port:
        got = [ask(port, "/guess/", "OPTIONS", PREFLIGHT).status for _ in range(3)]
    assert got == [401, 401, 429]


def test_a_route_that_names_options_is_charged_for_preflights(serve: Serve) -> None:
    """A route that names OPTIONS is charged for preflights, because the app answers them itself."""
    table = Routes([Route("/plain", [TWO], ["OPTIONS", "GET"])], default=[])
    with serve(routes=table) as port:
        got = [ask(port, "/plain", "OPTIONS", PREFLIGHT).status for _ in range(3)]
    assert got == [200, 200, 429]


def test_the_apps_cors_layer_is_asked_once_a_minute(settings: Settings) -> None:
    """The app's CORS layer is asked once a minute, also under a flood of refused requests."""
    asked: list[str] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        asked.append(environ["REQUEST_METHOD"])
        start_response("200 OK", [("Access-Control-Allow-Origin", environ.get("HTTP_ORIGIN", ""))])
        return [b""]

    with Stillroom(settings, dispatch=NoDispatch()) as room:
        with serving_wsgi(Wsgi(app, room, routes=Routes([], default=[Limit("no", 0, 60)]))) as port:
            for _ in range(5):
                reply = ask(port, "/x", "POST", FROM_SPA | {"Cookie": "secret=1"})
                assert (reply.status, reply.one("access-control-allow-origin")) == (429, SPA)
    assert asked == ["OPTIONS"]


@contextmanager
def behind(
    tables: Sequence[Routes], face: str, settings: Settings, wsgi: Any, asgi: Any
) -> Iterator[int]:
    """Serve one of these apps behind middlewares with these tables, the outer one first; yield the port."""

    def wrapped(app: Any, middleware: Any, room: Any) -> Any:
        for table in reversed(tables):
            app = middleware(app, room, routes=table)
        return app

    if face == "wsgi":
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            with serving_wsgi(wrapped(wsgi, Wsgi, room)) as port:
                yield port
        return
    other = AsyncStillroom(settings, dispatch=NoDispatch())
    with serving_asgi(lambda room: wrapped(asgi, Asgi, room), other) as port:
        yield port


class Handler:
    """A handler of a WSGI and an ASGI app that takes every method for a guess, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def wsgi(self, environ: Any, start_response: Any) -> list[bytes]:
        self.calls.append(environ["PATH_INFO"] + "?" + environ.get("QUERY_STRING", ""))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"wrong"]

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.calls.append(scope["path"] + "?" + scope["query_string"].decode())
        await PlainTextResponse("wrong")(scope, receive, send)

    def serving(
        self, face: str, settings: Settings, *tables: Routes
    ) -> AbstractContextManager[int]:
        """Serve it behind middlewares with these tables, the outer one first."""
        return behind(tables, face, settings, self.wsgi, self.asgi)


@pytest.mark.parametrize("face", ["wsgi", "asgi"])
def test_a_refused_client_does_not_reach_the_handler_by_naming_an_origin(
    face: str, settings: Settings
) -> None:
    """A refused client that names origins and paths makes the app answer one preflight, without its query."""
    handler = Handler()
    with handler.serving(face, settings, Routes([Route("/guess/{word}", [TWO])])) as port:
        for n in range(12):
            ask(port, f"/guess/{n}?word=tea", "GET", {"Origin": f"https://evil{n}.example"})
    assert handler.calls == ["/guess/0?word=tea", "/guess/1?word=tea", "/guess/2?"]


@pytest.mark.parametrize("face", ["wsgi", "asgi"])
def test_a_path_forges_no_line_of_the_log(face: str, settings: Settings, caplog: Any) -> None:
    """Where an app fails at a preflight, the log says so on one line, whatever the path and the error are."""

    def failing(environ: Any, start_response: Any) -> list[bytes]:
        raise RuntimeErrorOfTwoLines

    async def failing_too(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeErrorOfTwoLines

    table = [Routes([Route("/{path:path}", [Limit("none", 0, 60)])])]
    with behind(table, face, settings, failing, failing_too) as port:
        assert ask(port, "/a%0AFORGED%1B[31m", "GET", {"Origin": SPA}).status == 429
    (said,) = [text for text in caplog.messages if "preflight" in text]
    assert "/a\\nFORGED\\x1b[31m" in said
    assert said.isprintable()


class RuntimeErrorOfTwoLines(RuntimeError):
    def __repr__(self) -> str:
        return "of two\nFORGED lines"


@pytest.mark.parametrize("face", ["wsgi", "asgi"])
def test_a_preflight_that_no_cors_layer_answers_is_charged_the_next_time(
    face: str, settings: Settings
) -> None:
    """A client one of whose preflights the app has answered by itself is charged for its next ones."""
    handler = Handler()
    with handler.serving(face, settings, Routes([Route("/guess/{word}", [TWO])])) as port:
        got = [ask(port, f"/guess/{n}", "OPTIONS", PREFLIGHT).status for n in range(6)]
    assert got == [200, 200, 200, 429, 429, 429]
    assert len(handler.calls) == 3


def test_the_preflight_of_a_refusal_is_over_when_it_has_its_headers(settings: Settings) -> None:
    """An app that waits until its client has gone answers the preflight of a refusal, and streams no longer."""
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    with serving_asgi(lambda room: Asgi(streaming_until_gone, room, routes=TABLE), room) as port:
        refused = [ask(port, "/api", "GET", FROM_SPA) for _ in range(3)][-1]
    assert refused.status == 429
    assert refused.one("access-control-allow-origin") == SPA


async def streaming_until_gone(scope: Any, receive: Any, send: Any) -> None:
    """Stream to a preflight until it has gone, and watch out for that as Quart and Starlette do."""
    if scope["type"] != "http" or scope["method"] != "OPTIONS":
        await PlainTextResponse("ok")(scope, receive, send)
        return

    async def gone() -> None:
        for _ in range(100):
            if (await receive())["type"] == "http.disconnect":
                return
        raise AssertionError("the body ends again and again")

    waiting = asyncio.create_task(gone())
    await asyncio.sleep(0)
    assert not waiting.done(), "it has gone before it was answered"
    allowed = [(b"access-control-allow-origin", SPA.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": allowed})
    while not waiting.done():
        await send({"type": "http.response.body", "body": b".", "more_body": True})
        await asyncio.sleep(0)
    await waiting


def test_the_preflight_of_a_refusal_streams_nothing_for_a_newer_server(settings: Settings) -> None:
    """An app that hears from `send` that its client has gone, as ASGI 2.4 lets it, ends the preflight as well."""
    ended: list[str] = []

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(1_000):
            yield b"."
            await asyncio.sleep(0)
        ended.append("all was sent")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        allowed = {"access-control-allow-origin": SPA}
        await StreamingResponse(pieces(), headers=allowed)(scope, receive, send)

    async def asked() -> list[Any]:
        room, sent = AsyncStillroom(settings, dispatch=NoDispatch()), []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "GET"}
        scope |= {"path": "/", "query_string": b"", "scheme": "http", "client": ("127.0.0.1", 1)}
        scope["headers"] = [(b"host", b"api"), (b"origin", SPA.encode())]
        routes = Routes([Route("/", [Limit("none", 0, 60)])])
        await Asgi(app, room, routes=routes)(scope, None, send)  # type: ignore[arg-type]
        await room.close()
        return sent

    begin, _ = asyncio.run(asked())
    assert begin["status"] == 429
    assert (b"access-control-allow-origin", SPA.encode()) in begin["headers"]
    assert not ended


@pytest.mark.parametrize("mount", [False, True])
def test_a_preflight_that_the_cors_layer_answers_frees_the_next_ones(
    mount: bool, settings: Settings
) -> None:
    """After a preflight of an unknown origin one of the client is charged: the CORS layer answers it."""
    api = StarletteRoute("/api", lambda request: PlainTextResponse("ok"), methods=["POST"])
    inner = Starlette(routes=[api])
    inner.add_middleware(CORSMiddleware, allow_origins=[SPA], allow_methods=["*"])
    app = Starlette(routes=[Mount("/in", app=limited(TWO)(inner))]) if mount else inner
    path, table = ("/in/api", None) if mount else ("/api", TABLE)
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    with serving_asgi(lambda room: Asgi(app, room, routes=table), room) as port:
        stranger = PREFLIGHT | {"Origin": "https://evil.example"}
        assert ask(port, path, "OPTIONS", stranger).status == 400
        got = [ask(port, path, "OPTIONS", PREFLIGHT).status for _ in range(5)]
    assert got == [200] * 5, "one was charged, of two that may be"


@pytest.mark.parametrize("place", ["inside", "around", "both"])
@pytest.mark.parametrize("how", ["mount", "layer", "whole"])
def test_a_page_may_read_the_refusal_of_a_mounted_apps_limits(
    how: str, place: str, settings: Settings
) -> None:
    """A page of another origin may read a 429 of the limits around an app, wherever its CORS layer is.

    Other origins may read nothing, and the app is asked in a client's name a few times at the most.
    """
    methods = []

    async def api(request: Any) -> PlainTextResponse:
        methods.append(request.method)
        return PlainTextResponse("ok")

    layer = [Middleware(CORSMiddleware, allow_origins=[SPA], allow_methods=["*"])]
    inside, around = (layer if place in (one, "both") else [] for one in ("inside", "around"))
    route = StarletteRoute("/api", api, methods=["GET", "POST"])
    inner = Starlette(routes=[route], middleware=inside)
    path, limits = "/in/api", Middleware(limited(TWO))
    if how == "mount":
        app: Any = Starlette(routes=[Mount("/in", app=limited(TWO)(inner))], middleware=around)
    elif how == "layer":
        mount = Mount("/in", routes=[route], middleware=[limits, *inside])
        app = Starlette(routes=[mount], middleware=around)
    else:
        path, app = "/api", Starlette(routes=[route], middleware=[*around, limits, *inside])
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    with serving_asgi(lambda room: Asgi(app, room), room) as port:
        for _ in range(2):
            assert ask(port, path, "POST", FROM_SPA).status == 200
        for _ in range(3):
            denied = ask(port, path, "POST", FROM_SPA)
            assert denied.status == 429
            assert denied.all("access-control-allow-origin") == [SPA]
            assert "retry-after" in names_of(denied.one("access-control-expose-headers"))
            assert "origin" in names_of(denied.one("vary"))
        stranger = ask(port, path, "POST", {"Origin": "https://evil.example"})
        assert (stranger.status, stranger.one("access-control-allow-origin")) == (429, None)
        assert ask(port, path, "POST").one("access-control-expose-headers") is None
    assert methods == ["POST", "POST"]


def test_a_function_behind_limits_does_nothing_for_who_is_refused(settings: Settings) -> None:
    """A plain function that is mounted behind limits is not called in the name of a refused client."""
    methods = []

    async def work(scope: Any, receive: Any, send: Any) -> None:
        methods.append(scope["method"])
        await PlainTextResponse("done")(scope, receive, send)

    app = Starlette(routes=[Mount("/in", app=limited(TWO)(work))])
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    with serving_asgi(lambda room: Asgi(app, room), room) as port:
        got = [ask(port, "/in/work", "POST", FROM_SPA).status for _ in range(4)]
    assert got == [200, 200, 429, 429]
    assert methods == ["POST", "POST"]


def test_an_answer_to_a_preflight_may_have_no_headers(settings: Settings) -> None:
    """A mounted app that answers a preflight without any headers, as ASGI allows, is served."""

    class Bare:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})

    app = Starlette(routes=[Mount("/bare", app=limited(TWO)(Bare()))])
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    with serving_asgi(lambda room: Asgi(app, room), room) as port:
        assert ask(port, "/bare/", "OPTIONS", PREFLIGHT).status == 204


def test_a_mounted_app_without_a_cors_layer_is_charged_for_preflights(settings: Settings) -> None:
    """A mounted app without a CORS layer answers one preflight of a client that is not charged."""
    calls = []

    async def guess(request: Any) -> PlainTextResponse:
        calls.append(request.method)
        return PlainTextResponse("wrong")

    inner = Starlette(routes=[StarletteRoute("/", guess, methods=["GET", "OPTIONS"])])
    app = Starlette(routes=[Mount("/guess", app=limited(TWO)(inner))])
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    with serving_asgi(lambda room: Asgi(app, room), room) as port:
        got = [ask(port, "/guess/", "OPTIONS", PREFLIGHT).status for _ in range(5)]
    assert got == [200, 200, 200, 429, 429]
    assert len(calls) == 3


def test_what_is_learned_may_be_dropped_by_another_thread_meanwhile() -> None:
    """A thread that learns of a client raises nothing where another one drops this client at that moment."""

    class Crowded(OrderedDict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            self.popitem(last=False)

    unanswered = Unanswered()
    unanswered._known = Crowded()
    for _ in range(2):
        unanswered.learn("192.0.2.1", "/x", 0.0, [])
    assert not unanswered.charges("192.0.2.1", "/x", 0.0)


@pytest.mark.parametrize("method", ["OPTIONS", "GET"])
def test_parallel_requests_do_not_reach_the_handler_for_nothing(
    method: str, settings: Settings
) -> None:
    """Of a hundred preflights, or refused requests with an origin, at the same time a few reach the handler."""
    reached, refused, everybody = [], [], asyncio.Event()

    def note(known: list[str], path: str) -> None:
        known.append(path)
        if len(reached) + len(refused) == 100:
            everybody.set()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        note(reached, scope["path"])
        await everybody.wait()
        await PlainTextResponse("wrong")(scope, receive, send)

    async def main() -> None:
        table = Routes([], default=[Limit("few", 2 if method == "OPTIONS" else 0, 600)])
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            app = Asgi(handler, room, routes=table)

            async def one(n: int) -> None:
                async def send(message: Any) -> None:
                    if message.get("status") == 429 and f"/{n}" not in reached:
                        note(refused, f"/{n}")

                given = PREFLIGHT if method == "OPTIONS" else {"Origin": f"https://{n}.example"}
                headers = [(k.lower().encode(), v.encode()) for k, v in given.items()]
                scope = {"type": "http", "method": method, "path": f"/{n}", "query_string": b""}
                asked = {**scope, "headers": headers, "client": ("203.0.113.9", 1)}
                await app(asked, None, send)  # type: ignore[arg-type]

            await asyncio.gather(*map(one, range(100)))

    asyncio.run(main())
    assert len(reached) == (OPEN + 2 if method == "OPTIONS" else ASKS)


def test_the_app_is_asked_a_few_times_for_one_client() -> None:
    """A client has the app asked 8 times a minute, then each path is answered as the origin's last one was."""
    learned, allowed = Learned(), [("Access-Control-Allow-Origin", SPA)]
    for n in range(ASKS):
        assert learned.get((SPA, "GET", f"/{n}"), "192.0.2.1", 0.0) is None
        learned.add((SPA, "GET", f"/{n}"), "192.0.2.1", 0.0, allowed)
    assert learned.get((SPA, "GET", "/more"), "192.0.2.1", 1.0) == allowed
    assert learned.get(("https://evil.example", "GET", "/more"), "192.0.2.1", 1.0) == []
    assert learned.get((SPA, "GET", "/more"), "192.0.2.2", 1.0) is None
    assert learned.get((SPA, "GET", "/more"), "192.0.2.1", LEARNED_S) is None


# Around apps in apps


@pytest.mark.parametrize("face", ["wsgi", "asgi"])
def test_a_mounted_apps_own_table_holds_beside_the_outer_one(face: str, settings: Settings) -> None:
    """What only the table of a mounted app says is charged, and what both say is charged once."""
    both = Limit("both", 9, 60)
    outer, inner = Routes([], default=[both]), Routes([Route("/in/x", [TWO, both])], default=[])
    handler = Handler()
    with handler.serving(face, settings, outer, inner) as port:
        replies = [ask(port, "/in/x") for _ in range(4)]
        assert [reply.status for reply in replies] == [200, 200, 429, 429]
        assert all(len(reply.all("ratelimit")) == 1 for reply in replies)
        left = dict(
            part.strip().split(";")[:2]
            for part in (ask(port, "/else").one("ratelimit") or "").split(",")
        )
    assert left == {'"both"': "r=4"}, "five requests, each charged once"
    assert len(handler.calls) == 3


GUESSES = Limit("guesses", 2, 600)
PLACE = Limit("place", 1, 600, in_flight=True)


def right_in_wsgi(_: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"right"]


async def right(request: Any) -> PlainTextResponse:
    return PlainTextResponse("right")


def guessed(limit: Limit) -> Routes:
    return Routes([Route("/{path:path}", [limit], count="failures")])


def in_wsgi(room: Stillroom, limit: Limit) -> Any:
    return Wsgi(right_in_wsgi, room, routes=guessed(limit))


def in_flask(room: Stillroom, limit: Limit) -> Any:
    app = Flask("inner")
    StillroomLimits(app, room)
    app.add_url_rule("/login", "login", on_flask(limit, count="failures")(lambda: "right"))
    return app


def in_django(room: Stillroom, limit: Limit) -> Any:
    return WSGIHandler()


def in_asgi(room: AsyncStillroom, limit: Limit) -> Any:
    return Asgi(Starlette(routes=[StarletteRoute("/login", right)]), room, routes=guessed(limit))


def in_starlette(room: AsyncStillroom, limit: Limit) -> Any:
    endpoint = limited(limit, count="failures")(right)
    return Asgi(Starlette(routes=[StarletteRoute("/login", endpoint)]), room)


urlpatterns = [
    path(
        "login", on_django(GUESSES, PLACE, count="failures")(lambda request: HttpResponse("right"))
    )
]


@pytest.mark.parametrize("limit", [GUESSES, PLACE], ids=["failures", "in flight"])
@pytest.mark.parametrize("inner", [in_wsgi, in_flask, in_django, in_asgi, in_starlette])
def test_what_a_room_has_reserved_is_given_back_there(
    settings: Settings, inner: Any, limit: Limit
) -> None:
    """Where an app with a room is within another room's middleware, each gets back what it has reserved."""
    is_async = inner in (in_asgi, in_starlette)
    kind: Any = AsyncStillroom if is_async else Stillroom
    other = settings.model_copy(update={"redis_url": f"{settings.redis_url}/1"})
    rooms = [kind(one, dispatch=NoDispatch()) for one in (settings, other)]
    middleware = ["stillroom.web.django.limits.LimitsMiddleware"]
    with override_settings(
        ROOT_URLCONF=__name__,
        MIDDLEWARE=middleware,
        STILLROOM=PATIENT | {"redis_url": other.redis_url, "namespace": "inner"},
    ):
        app = (Asgi if is_async else Wsgi)(
            inner(rooms[1], limit),
            rooms[0],
            sessions=False,
            routes=guessed(Limit("outer", 2, 600)),
        )
        serves = serving_asgi(lambda _: app, rooms[0]) if is_async else serving_wsgi(app)
        with serves as port:
            assert [ask(port, "/login").status for _ in range(4)] == [200] * 4
        for one in (*rooms, room_of_django()):
            closing = one.close()
            asyncio.run(closing) if closing is not None else None


@pytest.mark.parametrize("face", ["wsgi", "asgi"])
def test_a_limit_that_costs_more_further_in_is_charged_the_rest(
    face: str, settings: Settings
) -> None:
    """A page that costs five of a limit has all of its five, though the table around its app has charged one."""
    both = Limit("both", 5, 60)
    outer = Routes([], default=[both])
    inner = Routes([Route("/in/x", [both], cost=5)], default=[])
    with Handler().serving(face, settings, outer, inner) as port:
        assert [ask(port, "/in/x").status for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("face", ["wsgi", "asgi"])
def test_a_missing_page_of_a_mounted_app_is_told_once(
    face: str, settings: Settings, room: Stillroom, client: Any
) -> None:
    """A page that is missing counts once towards a ban, though two tables stand around its app."""
    tables = [Routes([], default=[Limit(name, 9, 60)]) for name in ("outer", "inner")]

    def missing(environ: Any, start_response: Any) -> list[bytes]:
        start_response("404 Not Found", [])
        return [b""]

    with behind(tables, face, settings, missing, Starlette()) as port:
        assert [ask(port, f"/{n}").status for n in range(2)] == [404, 404]
        ask(port, "/again")
    told = sorted(fields[b"route"] for _, fields in client.xrange(room.keys.abuse))
    assert told == [b"/0", b"/1", b"/again"]


@pytest.mark.parametrize("face", ["wsgi", "asgi"])
def test_the_preflight_of_a_refusal_is_not_charged_by_an_inner_table(
    face: str, settings: Settings
) -> None:
    """A refused client does not pay for the preflight by which the app is asked for its CORS headers."""
    inner = Routes([Route("/x", [TWO], ["OPTIONS"])], default=[])
    outer = Routes([Route("/x", [Limit("no", 0, 60)], ["POST"])], default=[])
    handler = Handler()
    with handler.serving(face, settings, outer, inner) as port:
        assert ask(port, "/x", "POST", FROM_SPA).status == 429
        assert handler.calls == ["/x?"]
        got = [ask(port, "/x", "OPTIONS", PREFLIGHT).status for _ in range(3)]
    assert got == [200, 200, 429]


# In flight

PLACE = Limit("place", 1, 600, in_flight=True)


def places(room: Stillroom) -> int | None:
    return room.limits.peek("203.0.113.9", [PLACE]).remaining


@pytest.mark.parametrize("headers", [[("Content-Length", "10")], [], [("Content-Length", "?")]])
def test_a_place_is_free_when_the_client_has_the_whole_body(
    room: Stillroom, headers: list[tuple[str, str]]
) -> None:
    """A place is given back with the last piece of a body, so the client's next request is not refused."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", headers)
        yield b"first"
        yield b"other"

    asked = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "REMOTE_ADDR": "203.0.113.9"}
    body = iter(
        Wsgi(app, room, routes=Routes([], default=[PLACE]))(asked, lambda *_: lambda _: None)
    )
    assert (next(body), places(room)) == (b"first", 0)
    assert next(body) == b"other"
    if headers == [("Content-Length", "10")]:
        assert places(room) == 1, "the client knows that this was all"
    assert [*body] == []
    assert places(room) == 1


def test_a_place_of_a_flask_view_is_free_when_its_body_is_made(room: Stillroom) -> None:
    """A place of a view is given back before its whole body is sent, and of a stream when that is over."""
    app = Flask(__name__)
    StillroomLimits(app, room)
    app.add_url_rule("/whole", "whole", on_flask(PLACE)(lambda: "whole"))
    app.add_url_rule("/stream", "stream", on_flask(PLACE)(lambda: Response(iter(["a", "b"]))))
    for where, left in (("/whole", 1), ("/stream", 0)):
        asked = EnvironBuilder(where, environ_base={"REMOTE_ADDR": "203.0.113.9"}).get_environ()
        body = app.wsgi_app(asked, lambda *_: lambda _: None)
        assert places(room) == left
        b"".join(body)
        body.close()  # type: ignore[attr-defined]
        assert places(room) == 1


@pytest.mark.parametrize(
    "sent",
    [
        [
            {"type": "http.response.body", "body": b"x", "more_body": True},
            {"type": "http.response.body", "body": b"y"},
        ],
        [{"type": "http.response.pathsend", "path": "/x"}],
    ],
    ids=["pieces", "a file"],
)
def test_a_place_is_free_before_the_last_piece_and_background_tasks(
    settings: Settings, sent: list[dict[str, Any]]
) -> None:
    """In an ASGI app a place is given back before the last piece is sent, or a file by its path, and so before
    background tasks."""
    seen: list[int | None] = []

    async def main() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:

            async def left() -> int | None:
                return (await room.limits.peek("203.0.113.9", [PLACE])).remaining

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                for message in sent:
                    await send(message)
                seen.append(await left())

            async def send(message: Any) -> None:
                seen.append(await left())

            scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
            asked = {**scope, "client": ("203.0.113.9", 1)}
            await Asgi(app, room, routes=Routes([], default=[PLACE]))(asked, None, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert seen == [0] * len(sent) + [1, 1]


# Own words


def test_an_app_says_in_its_own_words_that_it_refuses(serve: Serve) -> None:
    """An app may word a denial itself by the client's Accept; status and headers stay."""

    def render(refusal: Refusal) -> tuple[str, bytes] | None:
        if refusal.header("Accept") != "text/html":
            return None
        assert refusal.retry_after is None, "a quota of 0 never comes back"
        return (
            "text/html",
            f"<p>{refusal.method} {refusal.path} {refusal.problem['title']}".encode(),
        )

    with serve(routes=Routes([], default=[Limit("no", 0, 60)]), render=render) as port:
        page = ask(port, "/plain", headers={"Accept": "text/html"})
        assert (page.status, page.one("content-type")) == (429, "text/html")
        assert page.text == "<p>GET /plain Quota exceeded"
        assert page.one("cache-control") == "no-store"
        assert ask(port, "/plain", "HEAD", {"Accept": "text/html"}).body == b""
        assert json.loads(ask(port, "/plain").text)["status"] == 429


# Exempt, failures and users


def test_requests_may_be_exempt_by_a_predicate(serve: Serve) -> None:
    """A predicate of the table exempts requests."""

    def is_probe(asked: Asked) -> bool:
        return ("x-probe", "1") in [(name.lower(), value) for name, value in asked.headers]

    with serve(routes=TABLE, exempt_when=is_probe) as port:
        assert [ask(port, "/plain", headers={"X-Probe": "1"}).status for _ in range(4)] == [200] * 4
        assert [ask(port, "/plain").status for _ in range(3)] == [200, 200, 429]


def test_a_route_may_count_failures_only(serve: Serve) -> None:
    """A route may count failures only: a request answered below 400 is refunded."""
    table = Routes([Route("/fail/{status}", [AUTH], count="failures")], default=[])
    with serve(routes=table) as port:
        assert [ask(port, "/fail/200?x").status for _ in range(8)] == [200] * 8
        got = [ask(port, "/fail/404?x").status for _ in range(7)]
        assert got == [404] * 5 + [429] * 2


def test_a_table_counts_by_the_sessions_user(serve: Serve, room: Stillroom) -> None:
    """A table counts by the session's user, and by address without a login."""
    by_user = Limit("mine", 2, 60, by="user")
    table = Routes([Route("/who", [by_user])], default=[])
    from tests.support.web import Browser

    with serve(routes=table) as port:
        ann = Browser(port)
        ann.get("/login?ann")
        assert [ann.get("/who").status for _ in range(3)] == [200, 200, 429]
        bob = Browser(port)
        bob.get("/login?bob")
        assert bob.get("/who").status == 200
        assert [ask(port, "/who").status for _ in range(3)] == [200, 200, 429]


# Websockets


HANDSHAKE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": base64.b64encode(b"0123456789abcdef").decode(),
}


@contextmanager
def serving_websockets(settings: Settings, **options: Any) -> Iterator[int]:
    """Serve an app with an open websocket and one behind a limit of its own."""
    import threading

    import uvicorn

    async def ws(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    @limited(TWO)
    class Whole(WebSocketEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.close()

    app = Starlette(
        routes=[
            WebSocketRoute("/ws", ws),
            WebSocketRoute("/own", limited(TWO)(ws)),
            WebSocketRoute("/class", Whole),
            Mount("/app", app=limited(TWO)(Starlette(routes=[WebSocketRoute("/ws", ws)]))),
        ]
    )
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    app.add_middleware(Asgi, room=room, **options)
    config = uvicorn.Config(app, port=0, log_config=None, ws="wsproto", proxy_headers=False)
    server = uvicorn.Server(config)

    async def serve() -> None:
        async with room:
            await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive(), "the server did not start"
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize("path", ["/own", "/class", "/app/ws"])
def test_a_websocket_has_its_endpoints_limits(settings: Settings, path: str) -> None:
    """A websocket has its endpoint's limits, on a function, a class or a mounted app, and is refused
    like a request.
    """
    with serving_websockets(settings) as port:
        replies = [ask(port, path, headers=HANDSHAKE) for _ in range(3)]
        assert [reply.status for reply in replies] == [101, 101, 429]
        assert replies[-1].one("retry-after")
        assert ask(port, "/ws", headers=HANDSHAKE).status == 101


@pytest.mark.parametrize("path", ["/own", "/class"])
def test_a_websocket_over_its_limit_is_closed_by_older_starlettes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Where Starlette answers no handshakes, one that is over its limit is closed, which is 403 and not 500."""
    monkeypatch.setattr(starlette_limits, "ANSWERS_HANDSHAKES", False)
    with serving_websockets(settings) as port:
        replies = [ask(port, path, headers=HANDSHAKE) for _ in range(3)]
        assert [reply.status for reply in replies] == [101, 101, 403]


def test_a_websocket_has_the_limits_of_the_table(settings: Settings) -> None:
    """A websocket has the limits that the table gives to GET."""
    with serving_websockets(settings, routes=Routes([Route("/ws", [TWO])], default=[])) as port:
        assert [ask(port, "/ws", headers=HANDSHAKE).status for _ in range(3)] == [101, 101, 429]


def test_an_open_websocket_is_no_failure(settings: Settings) -> None:
    """What an accepted handshake does not count is given back at once, and not when its websocket is closed."""

    @limited(TWO, count="failures")
    class Chat(WebSocketEndpoint):
        pass  # it accepts, and stays open

    room = AsyncStillroom(settings, dispatch=NoDispatch())
    app = Starlette(routes=[WebSocketRoute("/chat", Chat)], lifespan=room.lifespan)
    app.add_middleware(Asgi, room=room)
    with TestClient(app) as client, ExitStack() as tabs:
        for _ in range(3):
            tabs.enter_context(client.websocket_connect("/chat"))


def test_a_websocket_s_unknown_session_is_told_to_abuse(
    settings: Settings, room: Stillroom
) -> None:
    """A cookie that opens nothing is told to the abuse rules when it comes with a websocket, too."""

    @limited(TWO)
    async def chat(websocket: WebSocket) -> None:
        await load_session(websocket)
        await websocket.accept()

    inner = AsyncStillroom(settings, dispatch=NoDispatch())
    app = Starlette(routes=[WebSocketRoute("/chat", chat)], lifespan=inner.lifespan)
    app.add_middleware(Asgi, room=inner, cookie=SessionCookie("sid", secure=False))
    with TestClient(app, cookies={"sid": make_token(3, b"x" * 32)}) as client:
        for _ in range(2):  # what the first one told rides with the second one
            with client.websocket_connect("/chat"):
                pass
    with redis.Redis.from_url(settings.redis_url) as looking:
        told = [fields[b"kind"] for _, fields in looking.xrange(room.keys.abuse)]
    assert b"session_unknown" in told


@pytest.mark.parametrize("path", ["/ws", "/own", "/class", "/app/ws"])
def test_a_banned_client_opens_no_websocket(settings: Settings, room: Stillroom, path: str) -> None:
    """A banned client's websocket is refused with 403, whatever the limit."""
    settings = settings.model_copy(update={"trusted_proxies": ("127.0.0.0/8",)})
    room.abuse.ban("203.0.113.9", 60, "test")
    banned = HANDSHAKE | {"X-Forwarded-For": "203.0.113.9"}
    with serving_websockets(settings, routes=TABLE) as port:
        assert [ask(port, path, headers=banned).status for _ in range(3)] == [403] * 3


def test_a_server_that_can_only_close_closes(settings: Settings) -> None:
    """A server that cannot refuse a handshake closes the websocket with 1008."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    sent: list[Any] = []

    async def main() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            table = Routes([], default=[Limit("no", 0, 60)])
            middleware = Asgi(app, room, routes=table)
            scope = {"type": "websocket", "path": "/", "headers": [], "client": ("203.0.113.1", 1)}

            async def send(message: Any) -> None:
                sent.append(message)

            await middleware(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert [(one["type"], one["code"]) for one in sent] == [("websocket.close", 1008)]


# Mistakes, told when the app is made


def test_a_room_of_the_other_face_is_refused(settings: Settings) -> None:
    """Each middleware refuses a room of the other face and says which was meant."""
    room, other = Stillroom(settings), AsyncStillroom(settings)
    for make in (
        lambda: Asgi(None, room),  # type: ignore[arg-type]
        lambda: Wsgi(None, other),  # type: ignore[arg-type]
        lambda: HealthASGI(room),  # type: ignore[arg-type]
        lambda: HealthWSGI(other),  # type: ignore[arg-type]
        HealthWSGI,
        lambda: Wsgi(None, "redis://x"),  # type: ignore[arg-type, type-var]
    ):
        with pytest.raises(SettingsError, match="needs a room of the type"):
            make()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"routes": [Route("/a", [TWO])]}, r"did you mean Routes\("),
        ({"routes": "/a"}, "routes= is a Routes"),
        ({"routes": Routes([], default=[Limit("x", 1, 60, by="key")])}, "counts by key"),
        (
            {"routes": Routes([], default=[Limit("x", 1, 60, by="user")]), "sessions": False},
            "counts by user",
        ),
        ({"render": "html"}, "render= is a function"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(
    settings: Settings, options: dict[str, Any], reason: str
) -> None:
    """A bad table raises when the middleware is put around the app."""
    for middleware, room in ((Wsgi, Stillroom(settings)), (Asgi, AsyncStillroom(settings))):
        with pytest.raises(InvalidLimit, match=reason):
            middleware(None, room, **options)  # type: ignore[operator]


def test_health_goes_where_frameworks_add_middleware(settings: Settings) -> None:
    """The health middleware takes app and room in the order of frameworks, and in the other one too."""
    room = AsyncStillroom(settings, dispatch=NoDispatch())

    async def home(request: Any) -> PlainTextResponse:
        return PlainTextResponse("home")

    def make(room: AsyncStillroom) -> Starlette:
        app = Starlette(routes=[StarletteRoute("/", home)])
        app.add_middleware(HealthASGI, room=room)
        return app

    with serving_asgi(make, room) as port:
        assert ask(port, "/health/live").status == 200
        assert ask(port, "/").text == "home"
    with Stillroom(settings) as sync_room:
        for app in (HealthWSGI(flask_app(), sync_room), HealthWSGI(sync_room, app=flask_app())):
            with serving_wsgi(app) as port:
                assert ask(port, "/health/live").status == 200
                assert ask(port, "/login", "POST").text == "in"
        with pytest.raises(SettingsError, match="one too many"):
            HealthWSGI(flask_app(), flask_app(), sync_room)


# Routes that fit nothing


def flask_app() -> Flask:
    app = Flask("shop")
    app.add_url_rule("/login", "login", lambda: "in", methods=["POST"])
    app.add_url_rule("/product/<int:id>", "product", str)
    app.add_url_rule("/files/<path:name>", "files", lambda name: name)
    blueprint = Blueprint("admin", __name__, url_prefix="/admin")
    blueprint.add_url_rule("/users/<string:id>.html", "users", str)
    app.register_blueprint(blueprint)
    return app


def fastapi_app() -> FastAPI:
    async def nothing() -> None: ...

    app = FastAPI()
    app.add_api_route("/login", nothing, methods=["POST"])
    app.add_api_route("/product/{id}", nothing)
    app.add_api_route("/files/{name:path}", nothing)
    router = APIRouter(prefix="/admin")
    router.add_api_route("/users/{id}.html", nothing)
    app.include_router(router)
    return app


def starlette_app() -> Starlette:
    async def nothing(_: Any) -> None: ...

    users = StarletteRoute("/users/{id:int}.html", nothing)
    routes = [
        StarletteRoute("/login", nothing, methods=["POST"]),
        StarletteRoute("/product/{id:int}", nothing),
        StarletteRoute("/files/{name:path}", nothing),
        Mount("/admin", routes=[users]),
    ]
    return Starlette(routes=routes)


def django_app() -> WSGIHandler:
    return WSGIHandler()


class Urls:
    def view(self, request: Any) -> None: ...

    urlpatterns = [  # noqa: RUF012 - as Django has it
        path("login", view),
        path("product/<int:id>", view),
        path("files/<path:name>", view),
        path("admin/", include([path("users/<slug:id>.html", view)])),
    ]


APPS: dict[str, Callable[[], Any]] = {
    "flask": flask_app,
    "flask.wsgi_app": lambda: flask_app().wsgi_app,
    "fastapi": fastapi_app,
    "fastapi behind another": lambda: CORSMiddleware(fastapi_app()),
    "starlette": starlette_app,
    "django": django_app,
}


def told(app: Any, caplog: Any, *routes: Route, root: str = "") -> list[str]:
    caplog.clear()
    misfits = Misfits(Routes(routes))
    with caplog.at_level(logging.WARNING, "stillroom.web"):
        misfits.tell(app, root)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", APPS)
def test_a_route_that_fits_no_endpoint_is_told(name: str, caplog: Any) -> None:
    """A route that fits no endpoint is logged once with the probable one; a route that may fit is not."""
    with override_settings(ROOT_URLCONF=Urls()):
        app = APPS[name]()
        assert not told(
            app,
            caplog,
            Route("/login", [AUTH], ["POST"]),
            Route("/product/{number}"),
            Route("/files/a/b.css"),
            Route("/files/{path:path}"),
            Route("/admin/{path:path}"),
            Route("/admin/users/{id}.html"),
            Route("/{path:path}"),
        )
        (said,) = told(app, caplog, Route("/lgoin", [AUTH], ["POST"]))
        assert "the route POST /lgoin fits no endpoint" in said
        assert "did you mean /login?" in said
        assert len(told(app, caplog, Route("/products/{id}"), Route("/admin/user/{id}"))) == 2
        assert not told(app, caplog, Route("/api/login"), root="/api")
        if name != "django":  # whose views may answer any method
            assert told(app, caplog, Route("/login", [AUTH], ["GET"]))


def test_what_cannot_be_seen_of_an_app_is_not_guessed(caplog: Any) -> None:
    """Nothing is guessed about other apps, several apps side by side, regular expressions and other hosts."""

    def view(request: Any) -> None: ...

    class Regular:
        urlpatterns = [re_path(r"^(?P<lang>de|en)/login$", view)]  # noqa: RUF012

    async def nothing(_: Any) -> None: ...

    for app in (
        lambda environ, start_response: [],
        DispatcherMiddleware(flask_app(), {"/other": flask_app()}),
        Starlette(routes=[Host("x.example", app=starlette_app())]),
        Starlette(routes=[Mount("/", app=lambda scope, receive, send: None)]),  # type: ignore[arg-type, return-value]
        None,
    ):
        assert not told(app, caplog, Route("/lgoin")), app
    with override_settings(ROOT_URLCONF=Regular()):
        assert not told(WSGIHandler(), caplog, Route("/de/login"))


def test_an_app_is_seen_through_what_is_around_it(caplog: Any) -> None:
    """An app's routes are seen through a middleware that keeps it under its own name, or in a closure."""

    def around(app: Any) -> Any:
        return lambda *given: app(*given)  # noqa: PLW0108 - the app is in its closure

    class Kept:
        def __init__(self, app: Any) -> None:
            self._next = app

        def __call__(self, environ: Any, start_response: Any) -> Any:
            return self._next(environ, start_response)

    health = HealthWSGI(Stillroom(Settings()), flask_app())
    for app in (health, around(flask_app()), Kept(Kept(around(flask_app().wsgi_app)))):
        assert told(app, caplog, Route("/lgoin")), app
        assert not told(app, caplog, Route("/login")), app


def test_functions_that_know_each_other_are_each_looked_at_a_few_times() -> None:
    """Functions that hold each other, and lead to no app, are each looked at a few times, not along each way."""
    looked = 0

    class Held:
        @property
        def app(self) -> None:
            nonlocal looked
            looked += 1

        def __call__(self, *given: Any) -> None:
            """Stand for a function of a middleware."""

    them = [Held() for _ in range(12)]
    for one in them:
        vars(one).update({f"other{n}": other for n, other in enumerate(them)})
    assert list(layers(them[0])) == [them[0]]
    assert looked < 10 * len(them)


@pytest.mark.parametrize("explains", [False, True])
def test_an_app_that_raises_when_it_is_looked_at_is_served(
    settings: Settings, explains: bool
) -> None:
    """An app whose attributes raise is served and limited all the same, also where responses explain themselves."""

    class Raising:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await PlainTextResponse("ok")(scope, receive, send)

    given = settings.model_copy(update={"explain_header": explains})
    room = AsyncStillroom(given, dispatch=NoDispatch())
    with serving_asgi(lambda room: Asgi(Raising(), room, routes=TABLE), room) as port:
        assert [ask(port, "/x").status for _ in range(3)] == [200, 200, 429]


@pytest.mark.filterwarnings("ignore:The `root_path` parameter")
@pytest.mark.parametrize(("mount", "path"), [("/", "/api/login"), ("/api", "/api/login")])
def test_a_mounted_apps_root_path_is_the_tables_where_it_is_mounted_at_the_root(
    mount: str, path: str, settings: Settings
) -> None:
    """A root_path of an app that is mounted at `/` is taken off; one of an app further down is part of the path."""
    inner = FastAPI(root_path="/api")
    inner.post("/login")(lambda: "in")
    auth = Limit("auth", 9, 60)
    written = "/login" if mount == "/" else path
    table = Routes([Route(written, [auth])], default=[Limit("other", 9, 60)])
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    app = Starlette(routes=[Mount(mount, inner)])
    with serving_asgi(lambda room: Asgi(app, room, routes=table), room) as port:
        reply = ask(port, path, "POST")
    assert (reply.status, (reply.one("ratelimit") or "").split(";")[0]) == (200, '"auth"')
    assert "other" not in (reply.one("ratelimit") or "")


def test_it_is_told_at_start(settings: Settings, caplog: Any) -> None:
    """A route that fits nothing is logged at start by the lifespan, or else by the first request."""

    async def main() -> None:
        room = AsyncStillroom(settings, dispatch=NoDispatch())
        app = starlette_app()
        app.add_middleware(Asgi, room=room, routes=Routes([Route("/lgoin", [AUTH])]))

        async def receive() -> Any:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            await app({"type": "lifespan", "state": {}}, receive, send)
        await room.close()

    asyncio.run(main())
    assert "the route /lgoin fits no endpoint" in caplog.text


def test_the_first_request_tells_it_too(settings: Settings, caplog: Any) -> None:
    """The first request logs routes that fit nothing, because Flask's routes are known by then, and hidden ones."""
    app, table = Flask("late"), Routes([Route("/lgoin", [AUTH]), Route("/lgoin", methods=["POST"])])
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        app.wsgi_app = Wsgi(app.wsgi_app, room, routes=table)  # type: ignore[method-assign]
        app.add_url_rule("/login", "login", lambda: "in")
        with serving_wsgi(app) as port:
            assert read(ask(port, "/login").one("ratelimit")).keys() == {"default"}
    assert "did you mean /login?" in caplog.text
    assert "the route POST /lgoin is never reached: /lgoin comes first" in caplog.text
