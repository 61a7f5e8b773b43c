"""Measures what the middleware costs a request, beside the app alone and beside other session libraries.

Whole requests are called in process: the only sockets are Redis'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from typing import Any

from bench.harness import Contestant, Hit, Results, Spread, compete, ready
from bench.raw import floors
from bench.report import Promise, Section, contest_figures, contest_notes, contest_table
from bench.stage import Effort, Stage, stage
from stillroom import DEFAULT, Limit, Routes, Stillroom
from stillroom.web.wsgi import StillroomMiddleware

DATA = {"cart": [1, 2, 3], "theme": "dark", "csrf": "x" * 32}
WIDE = Limit("wide", 1_000_000, 60)
DEFAULT_WIDE = Limit("default", 1_000_000, DEFAULT.window)
LOOKS_NOT = 0.35  # of redis-py's GET, at most: the cost of a request that does not look
BOTH = 1.1  # of the two one after the other, at most: what it saves is a round trip, not this thread's time
PEER_OVER_OURS = 1.2  # at least
GET, ALONE = "GET", "app alone"
BLIND, SEES = "an app that looks not, with sessions", "an app that looks, with sessions"
APART, TOGETHER = "limits, then session", "limits and session"
PEERS = {
    "Flask with Flask-Session": "Flask with ours",
    "Django with its sessions on Redis": "Django with ours",
}


def run(effort: Effort) -> Section:
    with stage() as here:
        results = compete(contestants(here), rounds=effort.rounds, hits=effort.hits)
    return Section(
        name="requests",
        title="Requests, in process",
        tables=[contest_table(results, "a request")],
        promises=list(promises(results)),
        notes=contest_notes(results),
        figures=contest_figures(results),
    )


def promises(results: Results) -> Iterator[Promise]:
    """Yield the promises. Those beside other session libraries are in steps, which do not move with the machine."""
    blind, alone, get = results.cpu(BLIND), results.cpu(ALONE), results.cpu(GET)
    figure = Spread.of([(a - b) / c for a, b, c in zip(blind, alone, get, strict=True)])
    yield Promise("a request that does not look pays, × GET", figure, LOOKS_NOT, by="CPU")
    both = zip(results.cpu(TOGETHER), results.cpu(APART), strict=True)
    figure = Spread.of([a / b for a, b in both])
    yield Promise("limits and session in one round trip, × in two", figure, BOTH, by="CPU")
    for other, ours in PEERS.items():
        if {other, ours} <= set(results.by_name):
            ratio = results.steps_ratio(other, ours)
            claim = f"{other} takes, × {ours}"
            yield Promise(claim, ratio, PEER_OVER_OURS, at_most=False, by="steps")


def contestants(here: Stage) -> list[Contestant]:
    room, client = here.room, here.client
    token = room.sessions.create("u1", DATA).token
    client.set("plain", "x" * 200)
    limits = [WIDE, DEFAULT_WIDE]

    def check_and_look(environ: Any, start_response: Any) -> list[bytes]:
        assert room.limits.check(environ["REMOTE_ADDR"], limits).headers()
        return look(environ, start_response)

    limited = StillroomMiddleware(look, room, routes=Routes([], default=limits))
    ours = {
        BLIND: calling(StillroomMiddleware(plain, room), token),
        SEES: calling(StillroomMiddleware(look, room), token),
        APART: calling(StillroomMiddleware(check_and_look, room), token),
        TOGETHER: calling(limited, token),
    }
    return [
        floors(here.url)[0],
        Contestant(GET, "bare", ready(lambda: client.get("plain")), package="redis"),
        Contestant(ALONE, "peer", ready(calling(plain, token))),
        *(Contestant(name, "ours", ready(request)) for name, request in ours.items()),
        *pair(PEERS, 0, lambda: flask_apps(room, client), "flask-session"),
        *pair(PEERS, 1, lambda: django_apps(room, here.url), "django"),
    ]


def pair(
    peers: dict[str, str], place: int, make: Callable[[], tuple[Hit, Hit]], package: str
) -> Iterator[Contestant]:
    """Yield the app of others and ours. The first makes both, so they are skipped together."""
    other, ours = list(peers.items())[place]
    made: list[Hit] = []

    def prepared(which: int) -> Any:
        made.extend(() if made else make())
        return ready(made[which])()

    yield Contestant(other, "peer", partial(prepared, 0), package=package)
    yield Contestant(ours, "ours", partial(prepared, 1))


def plain(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"x"]


def look(environ: Any, start_response: Any) -> list[bytes]:
    assert environ["stillroom.session"]["theme"] == "dark"
    return plain(environ, start_response)


def calling(app: Any, token: str, cookie: str = "__Host-sid") -> Hit:
    def request() -> object:
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/",
            "SCRIPT_NAME": "",
            "QUERY_STRING": "",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "443",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "192.0.2.1",
            "wsgi.url_scheme": "https",
            "wsgi.input": BytesIO(),
            "HTTP_HOST": "localhost",
            "HTTP_COOKIE": f"theme=dark; {cookie}={token}; lang=en",
            "HTTP_ACCEPT": "*/*",
        }
        status: list[str] = []
        body = b"".join(app(environ, lambda given, *_: status.append(given)))
        assert (status, body) == (["200 OK"], b"x")
        return body

    return request


def flask_apps(room: Stillroom, client: Any) -> tuple[Hit, Hit]:
    from flask import Flask, session
    from flask_session.redis import RedisSessionInterface

    from stillroom.web.flask import StillroomSessions

    def view() -> str:
        assert session["theme"] == "dark"
        return "x"

    theirs, ours = Flask("theirs"), Flask("ours")
    theirs.session_interface = interface = RedisSessionInterface(theirs, client=client)
    client.set("session:bench", interface.serializer.encode(DATA), ex=86_400)
    ours.session_interface = StillroomSessions(room)
    for app in (theirs, ours):
        app.add_url_rule("/", view_func=view)
    token = room.sessions.create("u1", DATA).token
    return calling(theirs, "bench", "session"), calling(ours, token)


def django_apps(room: Stillroom, url: str) -> tuple[Hit, Hit]:
    from types import ModuleType

    import django
    from django.conf import settings
    from django.core.handlers.wsgi import WSGIHandler
    from django.http import HttpRequest, HttpResponse
    from django.test import override_settings
    from django.urls import path

    def view(request: HttpRequest) -> HttpResponse:
        assert request.session["theme"] == "dark"
        return HttpResponse("x")

    urls = ModuleType("bench_urls")
    urls.urlpatterns = [path("", view)]  # type: ignore[attr-defined]
    sys.modules["bench_urls"] = urls
    backend = "django.core.cache.backends.redis.RedisCache"
    settings.configure(
        ROOT_URLCONF="bench_urls",
        ALLOWED_HOSTS=["*"],
        CACHES={"default": {"BACKEND": backend, "LOCATION": url}},
        MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
        SESSION_ENGINE="django.contrib.sessions.backends.cache",
        SECRET_KEY="x",
        STILLROOM="bench.requests:shared_room",
    )
    django.setup()
    globals()["shared_room"] = room
    from django.contrib.sessions.backends.cache import SessionStore

    store = SessionStore()
    store.update(DATA)
    store.create()
    store.update(DATA)
    store.save()
    theirs = WSGIHandler()
    with override_settings(SESSION_ENGINE="stillroom.web.django.sessions"):
        ours = WSGIHandler()
    token = room.sessions.create("u1", DATA).token
    return calling(theirs, store.session_key, "sessionid"), calling(ours, token, "sessionid")
