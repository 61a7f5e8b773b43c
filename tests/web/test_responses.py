"""Sessions and limits hold for every response: streams, mounts, websockets, lost clients, Redis away."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from io import BytesIO
from typing import Any
from wsgiref.util import FileWrapper

import pytest

from stillroom import (
    AUTH,
    AsyncStillroom,
    Limit,
    NoDispatch,
    Route,
    Routes,
    SessionDataRefused,
    SessionNotFresh,
    SessionNotLoaded,
    SessionStoreUnavailable,
    SessionTooLate,
    Settings,
    Stillroom,
    TooManySessions,
    ValueTooLarge,
)
from stillroom.embedded import EmbeddedServer
from stillroom.leash import until
from stillroom.sessions.token import make_token
from stillroom.web.asgi import StillroomMiddleware as Asgi
from stillroom.web.wsgi import StillroomMiddleware as Wsgi
from tests.support.crowd import PATIENT
from tests.support.web import WITHIN, Browser, ask, serving_asgi, serving_wsgi
from tests.web.conftest import Serve

TEXT = [("Content-Type", "text/plain")]
PEPPER = str(PATIENT["session_peppers"])


def call_wsgi(app: Any, room: Stillroom, token: str | None = None) -> Any:
    """Return what a server gets from a WSGI app: status, headers and the body object as it is."""
    started: list[Any] = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
    if token:
        environ["HTTP_COOKIE"] = f"__Host-sid={token}"
    body = Wsgi(app, room)(environ, lambda *given: started.append(given) or started.append)
    return started, body


async def call_asgi(
    app: Any, room: AsyncStillroom, token: str | None = None, **scope: Any
) -> list[Any]:
    """Return the messages that reach the server."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    cookie = [(b"cookie", f"__Host-sid={token}".encode())] if token else []
    asked = {"type": "http", "method": "GET", "path": "/", "headers": cookie, **scope}
    await Asgi(app, room)(asked, receive, send)
    return sent


def run_asgi(settings: Settings, story: Callable[[AsyncStillroom], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            await story(room)

    asyncio.run(main())


# Streams, WSGI


def test_a_generator_may_write_until_its_first_piece(room: Stillroom) -> None:
    """A generator may write the session until its first piece, and after it a change raises."""
    errors: list[BaseException] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        session = environ["stillroom.session"]
        start_response("200 OK", TEXT)
        session["a"] = 1
        yield b"first"
        for change in (
            lambda: session.update(a=2),
            lambda: session.pop("a"),
            session.clear,
            session.renew,
            session.logout,
            lambda: session.login("ann"),
        ):
            try:
                change()
            except SessionTooLate as error:
                errors.append(error)
        yield b"second"

    started, body = call_wsgi(app, room)
    assert started == []
    assert b"".join(body) == b"firstsecond"
    assert len(errors) == 6
    token = dict(started[0][1])["Set-Cookie"].partition("=")[2].partition(";")[0]
    found = room.sessions.get(token)
    assert found is not None
    assert found.data == {"a": 1}


def test_an_empty_session_can_t_be_changed_late_either(room: Stillroom) -> None:
    """A logout of an empty anonymous session after the response has begun raises too."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        session = environ["stillroom.session"]
        start_response("200 OK", TEXT)
        yield b"first"
        for late in (session.logout, session.renew):
            with pytest.raises(SessionTooLate):
                late()

    assert list(call_wsgi(app, room)[1]) == [b"first"]


def test_a_stream_begins_once_where_a_server_gives_no_write(room: Stillroom) -> None:
    """A stream arrives whole where start_response returns nothing, as that of asgiref's WsgiToAsgi; nothing is
    closed there, and a place in flight is given back all the same."""
    place = Limit("one_at_once", 1, 60, in_flight=True)
    given = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "REMOTE_ADDR": "203.0.113.8"}

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        environ["stillroom.session"]["seen"] = True
        start_response("200 OK", TEXT)
        yield b"first"
        yield b"last"
        raise InterruptedError

    for _ in range(2):
        started: list[Any] = []
        served = Wsgi(app, room, routes=Routes([Route("/", [place])]))(
            {**given}, lambda *said, to=started: to.append(said)
        )
        pieces = iter(served)
        assert [next(pieces), next(pieces)] == [b"first", b"last"]
        with pytest.raises(InterruptedError):
            next(pieces)
        assert [said[0] for said in started] == ["200 OK"]


def test_a_list_changed_after_the_response_began_is_told(
    room: Stillroom, caplog: pytest.LogCaptureFixture
) -> None:
    """A list changed in place after the response began is logged as lost, because it could not be refused."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        session = environ["stillroom.session"]
        session["cart"] = ["tea"]
        start_response("200 OK", TEXT)
        yield b"first"
        session["cart"].append("jam")

    _, body = call_wsgi(app, room)
    list(body)
    assert "lost" not in caplog.text
    body.close()
    assert "changed after the response had begun: the change is lost" in caplog.text


@pytest.mark.parametrize("looks", [True, False])
def test_an_attribute_of_a_session_is_told_once(
    room: Stillroom, caplog: pytest.LogCaptureFixture, looks: bool
) -> None:
    """`session.cart = …` in place of `session["cart"] = …` is logged as lost, once for each name in a process."""
    name = f"cart_{looks}"

    def app(environ: Any, start_response: Any) -> list[bytes]:
        session = environ["stillroom.session"]
        session.get("cart") if looks else None
        setattr(session, name, ["tea"])
        start_response("200 OK", TEXT)
        return []

    for _ in range(2):
        call_wsgi(app, room)
    said = f"session.{name} = … is lost with its request: a session keeps its items, not attributes"
    assert [line.message.partition(";")[0] for line in caplog.records] == [said]


def test_an_attribute_of_a_websocket_s_session_is_told(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """An attribute that an app sets on a websocket's session before it is accepted is logged as lost."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["stillroom.session"].cart_of_a_websocket = ["tea"]
        await send({"type": "websocket.accept"})

    async def story(room: AsyncStillroom) -> None:
        await call_asgi(app, room, type="websocket")

    run_asgi(settings, story)
    assert "session.cart_of_a_websocket = … is lost with its request" in caplog.text


def test_a_body_is_handed_on_as_it_is(room: Stillroom) -> None:
    """A file body stays a file for sendfile and a list a list, where the session needs no more."""
    file = FileWrapper(BytesIO(b"x"))
    for given in (file, [b"x"], (b"x",)):

        def app(environ: Any, start_response: Any, given: Any = given) -> Any:
            start_response("200 OK", TEXT)
            return given

        assert call_wsgi(app, room)[1] is given


def test_an_empty_body_and_write(room: Stillroom) -> None:
    """A response without pieces, or one sent by start_response's write, still writes the session."""

    def empty(environ: Any, start_response: Any) -> Iterator[bytes]:
        environ["stillroom.session"]["a"] = 1
        start_response("204 No Content", [])
        return
        yield b""

    started, body = call_wsgi(empty, room)
    assert list(body) == []
    assert "Set-Cookie" in dict(started[0][1])

    def written(environ: Any, start_response: Any) -> list[bytes]:
        environ["stillroom.session"]["a"] = 1
        start_response("200 OK", TEXT)(b"piece")
        return []

    started, body = call_wsgi(written, room)
    assert "Set-Cookie" in dict(started[0][1])
    assert started[1:] == [b"piece"]


def test_an_app_may_change_its_mind_about_the_response(room: Stillroom) -> None:
    """start_response with exc_info replaces the earlier response, and raises once the server has begun."""
    raised = ValueError("x")
    info = (ValueError, raised, None)

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        start_response("502 Bad Gateway", TEXT, info)
        yield b"sorry"
        start_response("500 Late", TEXT, info)

    started, body = call_wsgi(app, room)
    list(body)
    assert [given[0] for given in started] == ["502 Bad Gateway", "500 Late"]
    assert [given[2] for given in started] == [info, info]


def test_the_app_s_body_is_closed_whatever_happens(room: Stillroom) -> None:
    """The app's body is closed also where it is not sent, as with a session too large or ended."""

    class Body:
        closed = 0

        def __iter__(self) -> Iterator[bytes]:
            return iter([b"x"])

        def close(self) -> None:
            self.closed += 1

    body = Body()

    def app(environ: Any, start_response: Any) -> Body:
        environ["stillroom.session"]["a"] = "x" * 100_000
        start_response("200 OK", TEXT)
        return body

    with pytest.raises(ValueTooLarge):
        call_wsgi(app, room)
    assert body.closed == 1
    token = room.sessions.create(None, {"a": 1}).token

    def late(environ: Any, start_response: Any) -> Body:
        environ["stillroom.session"]["a"] = 2
        room.sessions.destroy(token)
        start_response("200 OK", TEXT)
        return body

    started, answer = call_wsgi(late, room, token=token)
    assert started[0][0] == "409 Conflict"
    assert json.loads(b"".join(answer))["status"] == 409
    assert body.closed == 2


# Streams, ASGI


def test_a_stream_may_write_until_its_first_message(settings: Settings) -> None:
    """A stream may write until its first message.

    Later its Redis calls have a call's deadline, not the request's.
    """
    errors: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = await scope["stillroom.session"].load()
        session["a"] = 1
        await send({"type": "http.response.start", "status": 200})
        for n in range(3):
            await send({"type": "http.response.body", "body": b"%d" % n, "more_body": True})
            try:
                session["a"] = n
            except SessionTooLate as error:
                errors.append(error)
        await send({"type": "http.response.body"})

    async def story(room: AsyncStillroom) -> None:
        sent = await call_asgi(app, room)
        assert [message.get("body") for message in sent] == [None, b"0", b"1", b"2", None]
        assert b"set-cookie" in dict(sent[0]["headers"])

    run_asgi(settings, story)
    assert len(errors) == 3


def test_a_header_that_is_changed_keeps_its_letters(settings: Settings) -> None:
    """What a response with a new session says of caches keeps the bytes that the app wrote."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        (await scope["stillroom.session"].load())["a"] = 1
        said = [(b"cache-control", 'max-age=5, community="Café"'.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": said})
        await send({"type": "http.response.body"})

    async def story(room: AsyncStillroom) -> None:
        sent = await call_asgi(app, room)
        said = dict(sent[0]["headers"])[b"cache-control"].decode()
        assert said == 'private, max-age=5, community="Café"'

    run_asgi(settings, story)


def test_the_budget_of_a_request_ends_where_its_response_begins(own_server: EmbeddedServer) -> None:
    """A request's calls share its budget until the response begins; a stream may go on for longer."""
    spent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        own_server.freeze()
        try:
            await scope["stillroom.session"].load()
        except SessionStoreUnavailable as error:
            spent.append(error.reason)
        own_server.thaw()
        await send({"type": "http.response.start", "status": 200})
        spent.append(await room_.cache.set("k", 1))
        await send({"type": "http.response.body"})

    settings = Settings(
        redis_url=own_server.url,
        session_peppers=PEPPER,
        request_timeout=0.05,
        command_timeout=2,
        call_timeout=2,
        breaker_failures=100,
    )
    room_: Any = None

    async def story(room: AsyncStillroom) -> None:
        nonlocal room_
        room_ = room
        await call_asgi(app, room, token=make_token(1, b"x" * 32))

    run_asgi(settings, story)
    assert spent == ["timeout", True]


def test_dict_access_before_load_is_an_error(settings: Settings) -> None:
    """Dict access before `await session.load()` raises, on every request, with a cookie and without."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = scope["stillroom.session"]
        for look in (lambda: session["a"], lambda: session.user_id, lambda: session.login("ann")):
            with pytest.raises(SessionNotLoaded, match=r"await session\.load\(\)"):
                look()
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async def story(room: AsyncStillroom) -> None:
        for token in (None, make_token(1, b"x" * 32)):
            assert (await call_asgi(app, room, token))[0]["status"] == 204

    run_asgi(settings, story)


# What a session can't hold


def test_a_bad_key_is_told_where_it_is_set_and_a_bad_value_when_it_is_written(
    room: Stillroom,
) -> None:
    """A bad key raises SessionDataRefused when set, a bad value when written; save() lets the app handle both."""
    room.sessions.create("ann")

    def app(environ: Any, start_response: Any) -> list[bytes]:
        session = environ["stillroom.session"]
        with pytest.raises(SessionDataRefused, match="not tuple"):
            session[1, 2] = 2
        session["a"] = object()
        with pytest.raises(SessionDataRefused):
            session.save()
        start_response("200 OK", TEXT)
        return []

    started, _ = call_wsgi(app, room)
    assert "Set-Cookie" not in dict(started[0][1])

    def full(environ: Any, start_response: Any) -> list[bytes]:
        session = environ["stillroom.session"]
        session.login("ann", max_per_user=1, on_cap="reject")
        with pytest.raises(TooManySessions):
            session.save()
        start_response("403 Forbidden", TEXT)
        return []

    started, _ = call_wsgi(full, room)
    assert started[0][0] == "403 Forbidden"
    assert room.sessions.count("ann") == 1


def test_what_was_saved_stays_also_if_the_request_fails_later(
    room: Stillroom, caplog: pytest.LogCaptureFixture
) -> None:
    """A session that was saved sends its cookie even with a 500, because the earlier session has ended."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        environ["stillroom.session"].login("ann")
        environ["stillroom.session"].save()
        start_response("500 Sorry", TEXT)
        return []

    token = room.sessions.create(None, {"a": 1}).token
    started, _ = call_wsgi(app, room, token=token)
    assert "Set-Cookie" in dict(started[0][1])
    assert room.sessions.get(token) is None
    assert room.sessions.count("ann") == 1
    assert "dropped" not in caplog.text


def test_saved_early_it_is_written_once_and_its_cookie_goes_out(settings: Settings) -> None:
    """`save()` before the response writes once and sends the cookie, in both faces."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = await scope["stillroom.session"].load()
        session.login("ann")
        await session.save()
        with pytest.raises(SessionTooLate, match=r"save\(\) was called"):
            session["a"] = 1
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    async def story(room: AsyncStillroom) -> None:
        sent = await call_asgi(app, room)
        assert b"set-cookie" in dict(sent[0]["headers"])
        assert await room.sessions.count("ann") == 1

    run_asgi(settings, story)


# Around others


def test_a_mounted_app_shares_the_session_and_counts_nothing_twice(settings: Settings) -> None:
    """A mounted app behind the same middleware shares the outer session and is checked once."""
    routes = Routes([], default=[AUTH])

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        session = await scope["stillroom.session"].load()
        session["inner"] = True
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    async def story(room: AsyncStillroom) -> None:
        mounted = Asgi(inner, room, routes=routes)

        async def outer(scope: Any, receive: Any, send: Any) -> None:
            (await scope["stillroom.session"].load())["outer"] = True
            await mounted({**scope, "root_path": "/in"}, receive, send)

        app = Asgi(outer, room, routes=routes)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/in/x", "headers": [], "client": None}
        await app(scope, None, send)
        headers = [name for name, _ in sent[0]["headers"]]
        assert headers.count(b"set-cookie") == headers.count(b"ratelimit") == 1
        assert dict(sent[0]["headers"])[b"ratelimit"].startswith(b'"auth";r=4')

    run_asgi(settings, story)


def test_a_mounted_wsgi_app_shares_the_session(room: Stillroom) -> None:
    """A mounted WSGI app shares the outer session too."""

    def inner(environ: Any, start_response: Any) -> list[bytes]:
        environ["stillroom.session"]["inner"] = True
        start_response("200 OK", TEXT)
        return []

    mounted = Wsgi(inner, room)

    def outer(environ: Any, start_response: Any) -> Any:
        environ["stillroom.session"]["outer"] = True
        return mounted(environ, start_response)

    started, _ = call_wsgi(outer, room)
    cookies = [value for name, value in started[0][1] if name == "Set-Cookie"]
    assert len(cookies) == 1
    found = room.sessions.get(cookies[0].partition("=")[2].partition(";")[0])
    assert found is not None
    assert found.data == {"inner": True, "outer": True}


def test_limits_further_out_and_sessions_further_in(room: Stillroom) -> None:
    """Limits outside and sessions inside work together, and in the other order too."""
    routes = Routes([], default=[AUTH])

    def app(environ: Any, start_response: Any) -> list[bytes]:
        environ["stillroom.session"]["a"] = 1
        start_response("200 OK", TEXT)
        return []

    within = [Wsgi(Wsgi(app, room), room, sessions=False, routes=routes)]
    within += [Wsgi(Wsgi(app, room, sessions=False, routes=routes), room)]
    for left, both in zip((4, 3), within, strict=True):
        started: list[Any] = []
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "REMOTE_ADDR": "192.0.2.1"}
        both(environ, lambda *given, started=started: started.append(given))
        headers = dict(started[0][1])
        assert headers["RateLimit"].startswith(f'"auth";r={left}')
        assert "Set-Cookie" in headers


@pytest.mark.parametrize("kind", ["lifespan", "something new"])
def test_what_is_neither_http_nor_a_websocket_passes_through_untouched(
    settings: Settings, kind: str
) -> None:
    """A scope that is neither HTTP nor a websocket passes through untouched, without a session."""
    seen: list[Any] = []

    async def app(*given: Any) -> None:
        seen.extend(given)

    async def story(room: AsyncStillroom) -> None:
        given = ({"type": kind}, object(), object())
        await Asgi(app, room, routes=Routes())(*given)  # type: ignore[arg-type]
        assert all(one is other for one, other in zip(seen, given, strict=True))
        assert given[0] == {"type": kind}

    run_asgi(settings, story)


def test_cookies_in_several_headers_are_one(settings: Settings, room: Stillroom) -> None:
    """Cookies in several headers, as HTTP/2 sends them, are read as one."""
    token = room.sessions.create("ann").token
    users: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        users.append((await scope["stillroom.session"].load()).user_id)

    async def story(room: AsyncStillroom) -> None:
        headers = [(b"cookie", b"a=1"), (b"cookie", f"__Host-sid={token}".encode())]
        await call_asgi(app, room, headers=headers)

    run_asgi(settings, story)
    assert users == ["ann"]


def test_the_app_s_own_headers_are_kept(room: Stillroom) -> None:
    """The app's own Cache-Control, cookies and Vary are kept."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        environ["stillroom.session"]["a"] = 1
        own = [("Set-Cookie", "theme=dark"), ("Cache-Control", "no-store"), ("Vary", "Accept")]
        start_response("200 OK", own)
        return []

    started, _ = call_wsgi(app, room)
    names = [name for name, _ in started[0][1]]
    assert names == ["Set-Cookie", "Cache-Control", "Vary", "Vary", "Set-Cookie"]


# Clients that go away


def test_a_client_that_hangs_up_leaves_the_app_whole(serve: Serve, room: Stillroom) -> None:
    """A client that hangs up leaves its request's writes whole or absent, and the next request is served."""
    at_work, gone = threading.Event(), threading.Event()

    def hold(path: str) -> None:
        if path == "/set":
            at_work.set()
            gone.wait(WITHIN)

    with serve(hold) as port:
        token = room.sessions.create("ann", {"a": "0"}).token
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(
                b"GET /set?a=1&b=1 HTTP/1.1\r\nHost: x\r\n"
                b"Cookie: __Host-sid=" + token.encode() + b"\r\n\r\n"
            )
            assert at_work.wait(WITHIN)
        gone.set()
        assert json.loads(Browser(port, token).get("/keys").text) in (
            {"a": "0"},
            {"a": "1", "b": "1"},
        )


# Redis away


@pytest.fixture
def away() -> Settings:
    return Settings(redis_url="redis://127.0.0.1:1", session_peppers=PEPPER)


def test_redis_away_is_a_503_and_no_logout(face: str, away: Settings) -> None:
    """When Redis is away, using the session is a 503 with Retry-After and keeps the cookie.

    Other requests are served.
    """
    token = make_token(1, b"x" * 32)
    with serving(face, away) as port:
        for path in ("/cart", "/set?a=1", "/login?ann", "/logout", "/who"):
            reply = Browser(port, token).get(path)
            assert (reply.status, reply.one("retry-after")) == (503, "2")
            assert reply.one("content-type") == "application/problem+json"
            assert json.loads(reply.text)["title"] == "Service Unavailable"
            assert reply.token is None
        assert Browser(port).get("/set?a=1").status == 503
        assert Browser(port).get("/cart").text == "[]"
        assert Browser(port, token).get("/plain").status == 200
        assert Browser(port, token).get("/cart", "HEAD").body == b""


def test_redis_dies_under_a_route_that_reads_its_session_along(
    face: str, own_server: EmbeddedServer
) -> None:
    """When Redis dies the check falls back to the process, using the session is a 503, and both recover."""
    settings = Settings(redis_url=own_server.url, session_peppers=PEPPER, request_timeout=5)
    with serving(face, settings, routes=Routes()) as port:
        browser = Browser(port)
        browser.get("/cart/add?tea")
        for _ in range(2):
            assert browser.get("/cart").text == '["tea"]'
        own_server.kill()
        reply = browser.get("/cart")
        assert (reply.status, reply.token) == (503, None)
        assert browser.get("/plain").status == 200
        own_server.restart()
        assert until(lambda: browser.get("/cart").text == '["tea"]', WITHIN)


def serving(face: str, settings: Settings, **options: Any) -> Any:
    from tests.web.conftest import serving

    return serving(face, settings, **options)


def test_an_app_that_answers_500_to_that_is_corrected(face: str, away: Settings) -> None:
    """A framework's 500 for a missing Redis becomes a 503, and any other answer of the app is left."""
    token = make_token(1, b"x" * 32)
    status = {"/a": 500, "/b": 200, "/c": 502}

    def wsgi(environ: Any, start_response: Any) -> list[bytes]:
        with pytest.raises(SessionStoreUnavailable):
            environ["stillroom.session"].get("a")
        start_response(f"{status[environ['PATH_INFO']]} Said", TEXT)
        return [b"own"]

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        with pytest.raises(SessionStoreUnavailable):
            await scope["stillroom.session"].load()
        await send({"type": "http.response.start", "status": status[scope["path"]]})
        await send({"type": "http.response.body", "body": b"own"})

    def serving_own() -> Any:
        if face == "wsgi":
            return serving_wsgi(Wsgi(wsgi, Stillroom(away, dispatch=NoDispatch())))
        room = AsyncStillroom(away, dispatch=NoDispatch())
        return serving_asgi(lambda room: Asgi(asgi, room), room)

    with serving_own() as port:
        replies = [Browser(port, token).get(path) for path in status]
    assert [reply.status for reply in replies] == [503, 200, 502]
    assert [reply.text for reply in replies[1:]] == ["own", "own"]


@pytest.mark.parametrize("how", ["another error", "a group"])
def test_an_error_that_the_app_makes_of_that_is_a_503(face: str, away: Settings, how: str) -> None:
    """An app that raises another error of its missing session, as tasks do by a group, is answered with 503."""
    token = make_token(1, b"x" * 32)

    def other(error: Exception) -> Exception:
        return ExceptionGroup("tasks", [error]) if how == "a group" else RuntimeError("no user")

    def wsgi(environ: Any, start_response: Any) -> list[bytes]:
        try:
            return [environ["stillroom.session"].get("a")]
        except SessionStoreUnavailable as error:
            raise other(error) from error

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        try:
            await scope["stillroom.session"].load()
        except SessionStoreUnavailable as error:
            raise other(error) from error

    if face == "wsgi":
        started, body = call_wsgi(wsgi, Stillroom(away, dispatch=NoDispatch()), token=token)
        assert started[0][0] == "503 Service Unavailable"
        assert json.loads(b"".join(body))["status"] == 503
    else:
        room = AsyncStillroom(away, dispatch=NoDispatch())
        start, _ = asyncio.run(call_asgi(asgi, room, token))
        assert start["status"] == 503


@pytest.mark.parametrize("kind", ["wsgi", "http", "websocket"])
def test_a_session_of_another_adapter_that_is_away_is_a_503(away: Settings, kind: str) -> None:
    """An app whose session is another adapter's, as Django's is in Channels, is answered with 503 without Redis."""
    token, other = make_token(1, b"x" * 32), Stillroom(away, dispatch=NoDispatch())

    def wsgi(environ: Any, start_response: Any) -> list[bytes]:
        other.sessions.get(token)
        return []

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.to_thread(other.sessions.get, token)

    async def statuses() -> list[int]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": kind, "method": "GET", "path": "/", "headers": []}
        answering = {"extensions": {"websocket.http.response": {}}}
        room = AsyncStillroom(away, dispatch=NoDispatch())
        await Asgi(asgi, room, sessions=False)(scope | answering, None, send)  # type: ignore[arg-type]
        return [one["status"] for one in sent if one["type"].endswith("response.start")]

    if kind == "wsgi":
        room, started = Stillroom(away, dispatch=NoDispatch()), []
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
        Wsgi(wsgi, room, sessions=False)(environ, lambda *given: started.append(given))
        assert started[0][0] == "503 Service Unavailable"
    else:
        assert asyncio.run(statuses()) == [503]


def test_an_error_after_a_failure_that_was_handled_is_the_app_s_own(
    face: str, room: Stillroom
) -> None:
    """An app that goes on without a fresh session, and breaks later, raises its own error, and not a 401."""

    def go_on_without(session: Any) -> None:
        with pytest.raises(SessionNotFresh):
            session.require_fresh(60)
        raise RuntimeError("a bug")

    def wsgi(environ: Any, start_response: Any) -> list[bytes]:
        go_on_without(environ["stillroom.session"])
        return []

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        await scope["stillroom.session"].load()
        go_on_without(scope["stillroom.session"])

    def call() -> None:
        if face == "wsgi":
            call_wsgi(wsgi, room)
        else:
            asyncio.run(call_asgi(asgi, AsyncStillroom(room.settings, dispatch=NoDispatch())))

    with pytest.raises(RuntimeError, match="a bug"):
        call()


def test_another_service_s_failure_is_the_app_s_own(room: Stillroom, away: Settings) -> None:
    """An error of another room's session store stays the app's own and is not a 503."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        with Stillroom(away, dispatch=NoDispatch()) as other:
            other.sessions.create("x")
        return []

    with pytest.raises(SessionStoreUnavailable):
        call_wsgi(app, room)


def test_limits_go_on_while_redis_is_away(face: str, away: Settings) -> None:
    """When Redis is away the process keeps the default limits, and the response reports none."""
    with serving(face, away, routes=Routes([Route("/login", [AUTH])])) as port:
        assert ask(port, "/plain").status == 200
        statuses = [ask(port, "/login?ann").status for _ in range(7)]
        assert statuses == [503] * 5 + [429] * 2
