"""A shared cache, Apache's mod_cache, never hands one visitor's session to the next, with each face."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route as Path_

from stillroom import AsyncStillroom, Limit, NoDispatch, Routes, Settings, Stillroom
from stillroom.web.asgi import StillroomMiddleware as Asgi
from stillroom.web.flask import StillroomSessions
from stillroom.web.headers import private
from stillroom.web.wsgi import StillroomMiddleware as Wsgi
from tests.support.crowd import PATIENT
from tests.support.shared_cache import shared_cache
from tests.support.web import Browser, serving_asgi, serving_wsgi

PUBLIC = {
    "Cache-Control": "public, max-age=600, s-maxage=600",
    "CDN-Cache-Control": "public, max-age=600",
}
ROUTES = Routes([], default=[Limit("wide", 100_000, 60)])
# What a page does to the session before it says that everybody may keep it.
PAGES = ("about", "who", "set", "login", "renew", "logout")


def done(session: Any, page: str) -> str:
    """Do what the page is called for."""
    if page == "about":
        return "about us"
    if page == "set":
        session["seen"] = "yes"
    if page == "login":
        session.login("ann")
    if page == "renew":
        session.renew()
    if page == "logout":
        session.logout()
    return str(session.user_id)


def wsgi_app(environ: Any, start_response: Any) -> list[bytes]:
    page = environ["PATH_INFO"].rpartition("/")[2]
    text = done(environ["stillroom.session"], page)
    start_response("200 OK", [("Content-Type", "text/plain"), *PUBLIC.items()])
    return [text.encode()]


def flask_app(room: Stillroom) -> Any:
    app = flask.Flask("shop")
    app.session_interface = StillroomSessions(room)

    @app.get("/<page>")
    def page(page: str) -> Any:
        return done(flask.session, page), PUBLIC

    app.wsgi_app = Wsgi(app.wsgi_app, room, sessions=False, routes=ROUTES)  # type: ignore[method-assign]
    return app


def asgi_app(room: AsyncStillroom) -> Any:
    async def page(request: Request) -> PlainTextResponse:
        name = request.path_params["page"]
        session = request.scope["stillroom.session"]
        if name != "about":
            await session.load()
        return PlainTextResponse(done(session, name), headers=PUBLIC)

    return Asgi(Starlette(routes=[Path_("/{page}", page)]), room, routes=ROUTES)


@pytest.fixture(params=["wsgi", "flask", "asgi"])
def cached(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Iterator[int]:
    """Yield the port of the cache; each look at a session is written down."""
    busy = Settings(**{"redis_url": settings.redis_url} | PATIENT, session_touch=0.001)
    if request.param == "asgi":
        serving: Any = serving_asgi(asgi_app, AsyncStillroom(busy, dispatch=NoDispatch()))
    else:
        room = Stillroom(busy, dispatch=NoDispatch())
        app = flask_app(room) if request.param == "flask" else Wsgi(wsgi_app, room, routes=ROUTES)
        serving = serving_wsgi(app)
    with serving as behind, shared_cache(behind, tmp_path) as port:
        yield port


def test_a_stranger_never_gets_anothers_session(cached: int, room: Stillroom) -> None:
    """A stranger never gets another's session, whatever the page does and however loudly it says `public`."""
    for page in PAGES:
        for (
            first
        ) in PAGES:  # another page of the same route has looked, so the session is read along
            ann = Browser(cached, room.sessions.create("ann", {"cart": ["tea"]}).token)
            ann.get(f"/{first}?{page}")
            ann.token = ann.token or room.sessions.create("ann").token
            ann.get(f"/{page}?{first}")
            stranger = Browser(cached)
            reply = stranger.get(f"/{page}?{first}")
            assert reply.status == 200
            assert reply.token != ann.token or not ann.token, (page, first)
            assert reply.one("age") is None or (page, reply.text) == ("about", "about us")
            if page in ("who", "set", "renew", "logout"):
                assert reply.text == "None", (page, first)


@pytest.mark.parametrize(
    "name",
    [
        *("Surrogate-Control", "CDN-Cache-Control", "Cloudflare-CDN-Cache-Control"),
        *("Akamai-Cache-Control", "Edge-Control", "X-LiteSpeed-Cache-Control", "X-Accel-Expires"),
    ],
)
def test_no_header_for_caches_outlives_a_cookie(name: str) -> None:
    """With a session cookie every header that some cache reads instead of Cache-Control is removed."""
    more, without = private([("Cache-Control", "Public, S-MaxAge=60"), (name, "max-age=60")])
    assert dict(more) == {"Cache-Control": "private"}
    assert without == {"cache-control", name.lower()}


def test_a_page_that_looks_at_no_session_is_kept_by_the_cache(cached: int, room: Stillroom) -> None:
    """A page that uses no session is kept by the cache and given to everybody."""
    ann = Browser(cached, room.sessions.create("ann").token)
    for _ in range(2):
        ann.get("/who")
        ann.get("/about")
    reply = Browser(cached).get("/about")
    assert (reply.text, reply.token) == ("about us", None)
    assert reply.one("age") is not None
    assert reply.all("vary") == []


def test_this_cache_would_hand_a_cookie_on(tmp_path: Path) -> None:
    """Without the middleware this cache hands one visitor's cookie to the next, so the test can fail."""
    given: list[str] = []

    def naive(environ: Any, start_response: Any) -> list[bytes]:
        given.append("x")
        cookie = ("Set-Cookie", f"__Host-sid={'x' * len(given)}; Path=/")
        start_response("200 OK", [("Content-Type", "text/plain"), *PUBLIC.items(), cookie])
        return [b"x"]

    with serving_wsgi(naive) as behind, shared_cache(behind, tmp_path) as port:
        assert [Browser(port).get("/").token for _ in range(2)] == ["x", "x"]
