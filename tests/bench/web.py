"""What does the middleware cost a request, beside the app alone and beside other people's sessions?

    python tests/bench/web.py

Whole requests, called in process: no sockets but Redis'. CPU time of the calling thread, in rounds that take turns,
medians; the promises at the end are ratios of one round.
"""

import os
from collections.abc import Callable
from io import BytesIO
from statistics import median
from typing import Any

from harness import Table, apart_from, quiet_gc
from sessions import entering, ratio, say, timed

import redis
from stillroom import DEFAULT, Limit, NoDispatch, Routes, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.web.wsgi import StillroomMiddleware

ROUNDS, CALLS, WARM_UP = 60, 40, 3
DATA = {"cart": [1, 2, 3], "theme": "dark", "csrf": "x" * 32}
WIDE = Limit("wide", 1_000_000, 60)
LOOKS_NOT = 0.35  # of redis-py's GET, at most: what a request pays that does not look
BOTH = 1.1  # of the two one after the other, at most: what it saves is a round trip, not this thread's time
PEER_OVER_OURS = 1.2  # at least

Request = Callable[[], object]


def main() -> None:
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        apart_from(server.pid)
        settings = Settings(
            redis_url=server.url,
            session_peppers="p" * 32,
            command_timeout=5,
            call_timeout=30,
            request_timeout=30,
        )
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            room.stats.due = 1 << 62
            requests, peers = contestants(room, client, server.url)
            with quiet_gc():
                samples = measure(requests)
            report(samples, peers)


def contestants(
    room: Stillroom, client: Any, url: str
) -> tuple[dict[str, Request], dict[str, str]]:
    """Name → one request; and peer → ours."""
    token = room.sessions.create("u1", DATA).token
    client.set("plain", "x" * 200)
    requests: dict[str, Request] = {"redis-py get": lambda: client.get("plain")}
    for name, app in {"app that looks not": plain, "app that looks": look}.items():
        wrapped = StillroomMiddleware(app, room)
        requests[f"{name}, with sessions"] = calling(wrapped, token)
    limits = [WIDE, DEFAULT_WIDE]

    def check_and_look(environ: Any, start_response: Any) -> list[bytes]:
        assert room.limits.check(environ["REMOTE_ADDR"], limits).headers()
        return look(environ, start_response)

    requests["limits, then session"] = calling(StillroomMiddleware(check_and_look, room), token)
    limited = StillroomMiddleware(look, room, routes=Routes([], default=limits))
    requests["limits and session"] = calling(limited, token)
    requests["app alone"] = calling(plain, token)
    peers: dict[str, str] = {}
    for other, ours, make in (
        ("Flask with Flask-Session", "Flask with ours", flask_apps),
        ("Django with its sessions on Redis", "Django with ours", django_apps),
    ):
        with entering(other):
            requests[other], requests[ours] = make(room, client, url)
            peers[other] = ours
    return requests, peers


DEFAULT_WIDE = Limit("default", 1_000_000, DEFAULT.window)


def plain(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"x"]


def look(environ: Any, start_response: Any) -> list[bytes]:
    assert environ["stillroom.session"]["theme"] == "dark"
    return plain(environ, start_response)


def calling(app: Any, token: str, cookie: str = "__Host-sid", path: str = "/") -> Request:
    def request() -> object:
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
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


def flask_apps(room: Stillroom, client: Any, url: str) -> tuple[Request, Request]:
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


def django_apps(room: Stillroom, client: Any, url: str) -> tuple[Request, Request]:
    import sys
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
        STILLROOM="web:shared_room",
    )
    django.setup()
    globals()["shared_room"] = room
    sys.modules["web"] = sys.modules[__name__]
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


def measure(requests: dict[str, Request]) -> dict[str, list[float]]:
    """CPU µs of one request, round by round."""
    samples: dict[str, list[float]] = {name: [] for name in requests}
    names = list(requests)
    for number in range(WARM_UP + ROUNDS):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timed(requests[name], CALLS))
    return {name: values[WARM_UP:] for name, values in samples.items()}


def report(samples: dict[str, list[float]], peers: dict[str, str]) -> None:
    table = Table("request", "CPU µs", "× redis-py get")
    for name, values in samples.items():
        table.add(name, f"{median(values):.1f}", f"{ratio(values, samples['redis-py get']):.2f}")
    print(table)
    alone, get = samples["app alone"], samples["redis-py get"]
    added = [
        a - b for a, b in zip(samples["app that looks not, with sessions"], alone, strict=True)
    ]
    figure = ratio(added, get)
    say(figure <= LOOKS_NOT, f"a request that does not look pays ≤ {LOOKS_NOT} × get: {figure:.2f}")
    figure = ratio(samples["limits and session"], samples["limits, then session"])
    say(figure <= BOTH, f"limits and session in one round trip ≤ {BOTH} × in two: {figure:.2f}")
    for other, ours in peers.items():
        figure = ratio(samples[other], samples[ours])
        say(figure >= PEER_OVER_OURS, f"{other} ≥ {PEER_OVER_OURS} × {ours}: {figure:.2f}")


if __name__ == "__main__":
    os.environ.pop("REDIS_URL", None)
    main()
