"""Starlette and FastAPI work: test client, `request.session`, websockets, dependencies, other libraries."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import logging
import pickle
import socket
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from authlib.integrations.starlette_client import OAuth
from fastapi import Depends, FastAPI, WebSocket
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, WebSocketRoute
from starlette.routing import Route as Path_
from starlette.websockets import WebSocketDisconnect

from stillroom import (
    AsyncStillroom,
    InvalidArgument,
    NoDispatch,
    SessionNotLoaded,
    SessionStoreUnavailable,
    SessionTooLate,
    Settings,
    Stillroom,
)
from stillroom.web.asgi import StillroomMiddleware
from stillroom.web.ending import _tell_of_http
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.sockets import _tell_of_loss
from stillroom.web.starlette import fresh_session, load_session
from stillroom.wire import time_left
from tests.support.monitor import ON_ITS_WAY, READS_SESSION, sent
from tests.support.sessions import age
from tests.support.web import COOKIE, Browser, serving_asgi

SESSION = Depends(load_session)
FRESH = Depends(fresh_session(600))
Make = Callable[..., Any]


@pytest.fixture
def async_room(settings: Settings) -> Iterator[AsyncStillroom]:
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    yield room
    asyncio.run(room.close())  # also what was opened for threads, where no app's lifespan has


def wrapped(app: Any, room: AsyncStillroom, **options: Any) -> Any:
    app.add_middleware(StillroomMiddleware, room=room, **options)
    return app


class Around:
    """A middleware further out: it looks at the scope when the response begins, and at the end; and tries again."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.saw: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def looking(message: Any) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                self.look(scope)
            await send(message)

        try:
            await self._app(scope, receive, looking)
        except ZeroDivisionError:
            await self._app(scope, receive, looking)
        finally:
            self.look(scope)

    def look(self, scope: Any) -> None:
        route = getattr(scope.get("route"), "path", None)
        self.saw.append((route, scope.get("path_params"), scope.get("root_path")))


# What is around


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_middleware_further_out_sees_what_the_router_has_found(
    async_room: AsyncStillroom, is_wrapped: bool
) -> None:
    """Further out there are the route and its parameters in the scope, for the names of spans and metrics."""

    async def shown(request: Request) -> PlainTextResponse:
        request.state.who = "ann"
        return PlainTextResponse(request.path_params["number"])

    async def accepted(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    def seen(middleware: Callable[[Any], Any]) -> list[Any]:
        inner = [Path_("/price/{number}", shown), WebSocketRoute("/ws/{number}", accepted)]
        around = Around(middleware(Starlette(routes=[Mount("/in", routes=inner)])))
        client = TestClient(around)
        assert client.get("/in/price/7").text == "7"
        with client.websocket_connect("/in/ws/8"):
            pass
        return around.saw

    def ours(app: Any) -> Any:
        return StillroomMiddleware(app, async_room) if is_wrapped else wrapped(app, async_room)

    without = seen(lambda app: app)
    assert without[0][1:] == ({"number": "7"}, "/in")
    assert seen(ours) == without


def test_a_handler_of_all_errors_sees_the_session(
    async_room: AsyncStillroom, room: Stillroom
) -> None:
    """The app's own page of a 500 may say who is logged in, and its log which path that was; it changes nothing."""
    app = wrapped(FastAPI(), async_room)

    @app.exception_handler(Exception)
    async def told(request: Request, _: Exception) -> JSONResponse:
        session = await load_session(request)
        with pytest.raises(SessionTooLate):
            session["told"] = True
        said = [session.user_id, request.session["cart"], request.scope["route"].path]
        return JSONResponse(said, 500)

    @app.get("/fails/{looks}")
    async def fails(looks: bool, request: Request) -> None:
        if looks:
            request.session["cart"] = "changed"
        raise ZeroDivisionError

    token = room.sessions.create("ann", {"cart": "tea"}).token
    client = TestClient(app, raise_server_exceptions=False, cookies={COOKIE: token})
    assert client.get("/fails/no").json() == ["ann", "tea", "/fails/{looks}"]
    assert client.get("/fails/yes").json() == ["ann", "changed", "/fails/{looks}"]
    found = room.sessions.get(token)
    assert found is not None
    assert found.data == {"cart": "tea"}


def test_a_handler_of_all_errors_sees_the_session_of_a_response_that_has_begun(
    async_room: AsyncStillroom, room: Stillroom
) -> None:
    """An error behind the response, as of a background task, is told by a handler that looks at the session."""
    app, told = wrapped(FastAPI(), async_room), []

    @app.exception_handler(Exception)
    async def tells(request: Request, error: Exception) -> JSONResponse:
        told.append(((await load_session(request)).user_id, request.session["cart"], type(error)))
        return JSONResponse("is not sent", 500)

    def fails() -> None:
        raise ZeroDivisionError

    @app.get("/")
    async def page() -> PlainTextResponse:
        return PlainTextResponse("ok", background=BackgroundTask(fails))

    token = room.sessions.create("ann", {"cart": "tea"}).token
    client = TestClient(app, cookies={COOKIE: token})
    with pytest.raises(ZeroDivisionError):
        client.get("/")
    assert told == [("ann", "tea", ZeroDivisionError)]


def test_a_request_that_is_tried_again_has_its_session(async_room: AsyncStillroom) -> None:
    """Where a middleware further out tries once more, the second try reads the session anew and writes it."""
    tries: list[int] = []

    async def fails_once(request: Request) -> JSONResponse:
        request.session["tries"] = [*request.session.get("tries", []), len(tries)]
        tries.append(1)
        if len(tries) == 1:
            raise ZeroDivisionError
        return JSONResponse(request.session["tries"])

    app = wrapped(Starlette(routes=[Path_("/", fails_once)]), async_room)
    app.add_middleware(Around)
    client = TestClient(app)
    assert client.get("/").json() == [1]
    assert client.get("/").json() == [1, 2]


# request.session


def test_an_attribute_of_request_session_is_refused(async_room: AsyncStillroom) -> None:
    """`request.session.cart = …` would be lost: the error says what to write. Starlette's own are taken."""

    async def sets(request: Request) -> PlainTextResponse:
        for name in ("cart", "user_id"):
            with pytest.raises(InvalidArgument, match=f'request.session."{name}". = …'):
                setattr(request.session, name, ["tea"])
        request.session.setdefault("cart", []).append("tea")
        request.session.modified = True  # type: ignore[attr-defined]
        return PlainTextResponse(f"{request.session['cart']} {request.session.user_id}")  # type: ignore[attr-defined]

    client = TestClient(wrapped(Starlette(routes=[Path_("/", sets)]), async_room))
    assert [client.get("/").text for _ in range(2)] == ["['tea'] None", "['tea', 'tea'] None"]


async def put(request: Request) -> PlainTextResponse:
    request.session["_state_google_" + "x" * 60] = {"data": {"nonce": 1}}
    return PlainTextResponse("ok")


async def shown(request: Request) -> JSONResponse:
    return JSONResponse(dict(request.session))


async def cleared(request: Request) -> PlainTextResponse:
    request.session.clear()
    return PlainTextResponse("ok")


async def untouched(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


def dict_app(room: AsyncStillroom) -> Any:
    paths = {"/put": put, "/shown": shown, "/cleared": cleared, "/untouched": untouched}
    return wrapped(Starlette(routes=[Path_(path, view) for path, view in paths.items()]), room)


def test_request_session_is_the_session_as_a_dict(
    async_room: AsyncStillroom, room: Stillroom
) -> None:
    """`request.session` is the session as a dict, with OAuth's long keys and a clear that logs out."""
    with serving_asgi(dict_app, async_room) as port:
        browser = Browser(port)
        browser.get("/put")
        assert browser.token
        assert (
            browser.get("/shown").text == '{"_state_google_' + "x" * 60 + '":{"data":{"nonce":1}}}'
        )
        assert browser.get("/cleared").token == ""
        assert room.sessions.count() == 0
        assert browser.get("/shown").text == "{}"


def test_what_was_not_loaded_is_read_ahead_from_then_on(
    async_room: AsyncStillroom, client: Any
) -> None:
    """A session used without `load` is read ahead from then on; only the first look blocks the event loop."""
    with serving_asgi(dict_app, async_room) as port:
        browser = Browser(port)
        browser.get("/put")
        wires: list[bool] = []
        at_once = async_room.state_wire.for_threads
        execute = at_once.execute
        at_once.execute = lambda *given, **named: wires.append(True) or execute(*given, **named)  # type: ignore[method-assign]
        browser.get("/shown")
        assert wires.pop()
        wires.clear()
        for _ in range(3):
            assert sent(client, lambda: browser.get("/shown"), but=ON_ITS_WAY) == READS_SESSION
        assert wires == []
        assert sent(client, lambda: browser.get("/untouched"), but=ON_ITS_WAY) == []


def test_a_login_that_is_not_fresh_is_401_inside_an_app_too(async_room: AsyncStillroom) -> None:
    """An unhandled `require_fresh` is a 401 also where the middleware is one of the app's own."""

    async def sensitive(request: Request) -> PlainTextResponse:
        (await load_session(request)).require_fresh(600)
        return PlainTextResponse()

    app = wrapped(Starlette(routes=[Path_("/sensitive", sensitive)]), async_room)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/sensitive")
    assert (answer.status_code, answer.json()["max_age"]) == (401, 600)


READS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "copy": lambda data: data.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda data: pickle.loads(pickle.dumps(data)),
    "dict": dict,
    "|": lambda data: data | {},
    "| from the right": lambda data: {} | data,
    "**": lambda data: {**data},
    "reversed": lambda data: {key: data[key] for key in [*reversed(data)][::-1]},
    "items": lambda data: dict(data.items()),
}


@pytest.mark.parametrize("name", READS)
def test_a_session_in_the_scope_is_read_by_whatever_a_dict_can_do(
    name: str, async_room: AsyncStillroom
) -> None:
    """Whatever a dict can do reads `scope["session"]` first, which older Starlettes hand out as it is."""
    given = {"a": 1, "b": [1]}

    async def begin(request: Request) -> PlainTextResponse:
        request.session.update(given)
        return PlainTextResponse()

    async def look(request: Request) -> JSONResponse:
        return JSONResponse(READS[name](request.scope["session"]))

    app = Starlette(routes=[Path_("/begin", begin), Path_("/look", look)])
    with TestClient(wrapped(app, async_room)) as client:
        client.get("/begin")
        assert client.get("/look").json() == given


ACTS: dict[str, Callable[[Any], Any]] = {
    "login": lambda session: session.login("ann"),
    "logout": lambda session: session.logout(),
    "renew": lambda session: session.renew(),
    "confirm": lambda session: session.confirm(),
    "mutate": lambda session: session.mutate(lambda data: data.clear()),
    "user_id": lambda session: session.user_id,
    "found": lambda session: session.found,
    "is_fresh": lambda session: session.is_fresh(60),
}


@pytest.mark.parametrize("name", ACTS)
def test_a_session_in_the_scope_is_read_by_what_is_the_session_s_own(
    name: str, async_room: AsyncStillroom
) -> None:
    """`login`, `renew` and the rest of the session work at `scope["session"]` without a load, too."""

    async def begin(request: Request) -> PlainTextResponse:
        request.session["a"] = 1
        return PlainTextResponse()

    async def act(request: Request) -> JSONResponse:
        session = request.scope["session"]
        ACTS[name](session)
        return JSONResponse(dict(session))

    app = Starlette(routes=[Path_("/begin", begin), Path_("/act", act)])
    with TestClient(wrapped(app, async_room)) as client:
        client.get("/begin")
        before = dict(client.cookies)
        assert client.get("/act").json() == ({} if name in ("logout", "mutate") else {"a": 1})
        is_new = name in ("login", "logout", "renew", "confirm")
        assert (dict(client.cookies) != before) == is_new


def test_request_session_says_503_while_redis_is_away() -> None:
    """When Redis is away `request.session` is a 503 and keeps the cookie; other requests are served."""
    away = AsyncStillroom(Settings(redis_url="redis://127.0.0.1:1", session_peppers="p" * 40))
    with serving_asgi(dict_app, away) as port:
        token = "00." + "A" * 43
        for _ in range(2):
            reply = Browser(port, token).get("/shown")
            assert (reply.status, reply.one("retry-after"), reply.token) == (503, "2", None)
        assert Browser(port, token).get("/untouched").status == 200
        assert Browser(port).get("/shown").text == "{}"


@pytest.mark.parametrize("is_mounted", [True, False])
def test_a_page_of_another_origin_reads_that_503(is_mounted: bool) -> None:
    """A framework's 500 for a missing Redis passes no CORS layer, but the 503 in its place can be read."""
    away = AsyncStillroom(Settings(redis_url="redis://127.0.0.1:1", session_peppers="p" * 40))
    spa = "https://spa.example"
    app = Starlette(routes=[Path_("/shown", shown)])
    app.add_middleware(CORSMiddleware, allow_origins=[spa], allow_credentials=True)
    ours: Any = StillroomMiddleware(app, away)
    if is_mounted:
        ours = wrapped(Starlette(routes=[Mount("/in", app)]), away)
    client = TestClient(ours, cookies={COOKIE: "00." + "A" * 43})
    reply = client.get("/in/shown" if is_mounted else "/shown", headers={"Origin": spa})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert reply.headers["access-control-allow-origin"] == spa


def test_another_session_middleware_keeps_its_own(async_room: AsyncStillroom) -> None:
    """A `scope["session"]` of another middleware is left alone."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["session"])

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "session": {"theirs": 1}}
    asyncio.run(StillroomMiddleware(app, async_room)(scope, None, None))  # type: ignore[arg-type]
    assert seen == [{"theirs": 1}]


def test_authlib_finds_what_it_left(async_room: AsyncStillroom) -> None:
    """Authlib keeps its state in the session over the redirect to the provider and back."""
    oauth = OAuth()
    oauth.register(
        "a_provider_with_a_long_name",
        client_id="id",
        client_secret="secret",
        authorize_url="https://provider.example/authorize",
        access_token_url="https://provider.example/token",
    )
    provider = oauth.a_provider_with_a_long_name

    async def login(request: Request) -> Any:
        return await provider.authorize_redirect(request, "https://shop.example/back")

    async def back(request: Request) -> Any:
        states = [key for key in request.session if key.startswith("_state_")]
        return JSONResponse([len(states), request.query_params["state"] in states[0]])

    routes = [Path_("/login", login), Path_("/back", back)]
    app = wrapped(Starlette(routes=routes, lifespan=async_room.lifespan), async_room)
    with TestClient(app, follow_redirects=False) as client:
        state = client.get("/login").headers["location"].partition("state=")[2].partition("&")[0]
        assert client.get(f"/back?state={state}").json() == [1, True]


# Their test client, and plain http


def shop(room: AsyncStillroom, **options: Any) -> Any:
    app = FastAPI(lifespan=room.lifespan)

    @app.post("/login/{user}")
    async def login(user: str, session: Any = SESSION) -> Any:
        session.login(user)
        return {"user": user}

    @app.get("/me")
    async def me(session: Any = SESSION) -> Any:
        return {"user": session.user_id}

    @app.post("/password")
    async def password(session: Any = FRESH) -> Any:
        return {"user": session.user_id}

    @app.post("/confirm")
    async def confirm(session: Any = SESSION) -> Any:
        session.confirm()
        return {}

    @app.websocket("/ws")
    async def ws(socket: WebSocket, session: Any = SESSION) -> None:
        await socket.accept()
        await socket.send_text(str(session.user_id))
        await socket.close()

    return wrapped(app, room, **options)


def test_the_test_client_stays_logged_in_over_http(
    async_room: AsyncStillroom, caplog: pytest.LogCaptureFixture
) -> None:
    """Starlette's test client over http://testserver stays logged in as strictly as a browser, with
    websockets too.
    """
    with TestClient(shop(async_room)) as client:
        client.post("/login/ann")
        assert client.get("/me").json() == {"user": "ann"}
        with client.websocket_connect("/ws") as socket:
            assert socket.receive_text() == "ann"
    with TestClient(shop(async_room), base_url="https://testserver") as client:
        assert "Secure" in client.post("/login/ann").headers["set-cookie"]
        assert client.get("/me").json() == {"user": "ann"}
    assert "plain http" not in caplog.text


def test_the_test_client_of_older_starlettes_stays_logged_in_too(
    async_room: AsyncStillroom,
) -> None:
    """The test client is known where it names itself by a list, as in older releases of Starlette."""

    async def listed(scope: Any, receive: Any, send: Any) -> None:
        if "client" in scope:
            scope = {**scope, "client": [*scope["client"]]}
        await app(scope, receive, send)

    app = shop(async_room)
    with TestClient(listed) as client:
        client.post("/login/ann")
        assert client.get("/me").json() == {"user": "ann"}


def test_a_secure_cookie_over_http_is_told_once(
    async_room: AsyncStillroom, caplog: pytest.LogCaptureFixture
) -> None:
    """A secure cookie over http is logged once, because a login would be lost.

    A proxy that speaks https is believed.
    """
    _tell_of_http.cache_clear()
    with serving_asgi(shop, async_room) as port:
        Browser(port).get("/login/ann", "POST", {"X-Forwarded-Proto": "https"})
        assert "plain http" not in caplog.text
        for _ in range(2):
            assert Browser(port).get("/login/ann", "POST").token
    said = [r for r in caplog.records if "plain http" in r.message]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert COOKIE in said[0].message


def test_a_cookie_that_is_not_secure_says_nothing(
    async_room: AsyncStillroom, caplog: pytest.LogCaptureFixture
) -> None:
    """A cookie that an app made insecure logs nothing."""
    _tell_of_http.cache_clear()
    plain = SessionCookie("sid", secure=False)
    with serving_asgi(lambda room: shop(room, cookie=plain), async_room) as port:
        assert Browser(port).get("/login/ann", "POST").all("set-cookie")
    assert "plain http" not in caplog.text


# Dependencies


def test_load_session_without_the_middleware_says_what_to_write() -> None:
    """load_session without the middleware raises an error that says what to write."""
    app = FastAPI()

    @app.get("/")
    async def page(session: Any = SESSION) -> Any:
        return {}

    with TestClient(app) as client, pytest.raises(SessionNotLoaded, match="add_middleware"):
        client.get("/")


def test_a_middleware_that_is_added_behind_ours_is_told(async_room: AsyncStillroom) -> None:
    """What is added last is the outermost, and has no session yet: the error says in which order they come."""
    app = wrapped(FastAPI(), async_room)

    @app.middleware("http")
    async def who(request: Request, call_next: Any) -> Any:
        await load_session(request)
        return await call_next(request)

    with TestClient(app) as client, pytest.raises(SessionNotLoaded, match="the last one added is"):
        client.get("/")


def test_a_sensitive_page_asks_again(
    async_room: AsyncStillroom, room: Stillroom, client: Any
) -> None:
    """A sensitive page answers 401 without a recent login; after `confirm` it opens, under a new token."""
    with serving_asgi(shop, async_room) as port:
        browser = Browser(port)
        assert browser.get("/password", "POST").status == 401
        browser.get("/login/ann", "POST")
        assert browser.get("/password", "POST").status == 200
        (device,) = room.sessions.list_for_user("ann")
        age(client, room, device.handle, 601)
        reply = browser.get("/password", "POST")
        assert reply.status == 401
        assert "601 s ago" in reply.text
        before = browser.token
        browser.get("/confirm", "POST")
        assert browser.token not in (before, None)
        assert room.sessions.get(before or "") is None
        assert browser.get("/password", "POST").status == 200


# Websockets


class Socket:
    """A websocket's handshake made by hand: its status, headers and cookie."""

    def __init__(
        self, port: int, path: str = "/ws", token: str | None = None, **headers: str
    ) -> None:
        key = b64encode(b"0123456789abcdef").decode()
        lines = [
            f"GET {path} HTTP/1.1",
            "Host: shop.example",
            "Upgrade: websocket",
            "Connection: Upgrade",
        ]
        lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}"]
        lines += [f"Cookie: {COOKIE}={token}"] if token else []
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            head = b""
            while b"\r\n\r\n" not in head and (got := connection.recv(4096)):
                head += got
        first, *rest = head.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        self.status = int(first.split(" ")[1])
        self.headers = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in rest}

    @property
    def token(self) -> str | None:
        line = self.headers.get("set-cookie")
        return None if line is None else line.partition("=")[2].partition(";")[0]


def sockets(act: Callable[[Any, WebSocket], Any]) -> Make:
    async def endpoint(websocket: WebSocket) -> None:
        await act(await load_session(websocket), websocket)

    return lambda room: wrapped(Starlette(routes=[WebSocketRoute("/ws", endpoint)]), room)


@pytest.fixture
def serve_sockets(async_room: AsyncStillroom, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Serve with uvicorn and websockets."""
    import uvicorn

    config = uvicorn.Config
    monkeypatch.setattr(
        uvicorn, "Config", lambda app, **given: config(app, **given | {"ws": "wsproto"})
    )
    return lambda act: serving_asgi(sockets(act), async_room)


def test_a_websocket_brings_its_cookie_with_the_handshake(
    serve_sockets: Make, room: Stillroom
) -> None:
    """A change before a websocket is accepted is written, and a login there changes the token."""

    async def login(session: Any, websocket: WebSocket) -> None:
        session.login("ann")
        await websocket.accept()
        with pytest.raises(SessionTooLate):
            session["late"] = 1
        await websocket.close()

    start = room.sessions.create(None, {"cart": ["tea"]}).token
    with serve_sockets(login) as port:
        made = Socket(port, token=start)
    assert made.status == 101
    assert made.token not in (start, None, "")
    found = room.sessions.get(made.token or "")
    assert found is not None
    assert (found.user_id, found.data) == ("ann", {"cart": ["tea"]})
    assert room.sessions.get(start) is None


def test_a_websocket_s_own_headers_are_left_as_they_are(serve_sockets: Make) -> None:
    """Bytes of a header that are no ASCII come to the client as the app has given them."""

    async def accept(_: Any, websocket: WebSocket) -> None:
        await websocket.accept(headers=[(b"x-name", "Zo\u00eb".encode())])
        await websocket.close()

    with serve_sockets(accept) as port:
        assert Socket(port).headers["x-name"] == "Zo\u00eb"


def test_a_websocket_that_is_refused_keeps_nothing(serve_sockets: Make, room: Stillroom) -> None:
    """A websocket that is closed before it was accepted writes nothing and sends no cookie."""

    async def refuse(session: Any, websocket: WebSocket) -> None:
        session["cart"] = ["tea"]
        await websocket.close()

    with serve_sockets(refuse) as port:
        assert (Socket(port).status, Socket(port).token) == (403, None)
    assert room.sessions.count() == 0


def test_a_websocket_whose_session_ended_meanwhile_is_refused(
    serve_sockets: Make, room: Stillroom
) -> None:
    """A websocket whose session ended meanwhile is refused with 409."""
    start = room.sessions.create("ann").token

    async def late(session: Any, websocket: WebSocket) -> None:
        session["a"] = 1
        await asyncio.to_thread(room.sessions.destroy, start)
        await websocket.accept()

    with serve_sockets(late) as port:
        assert Socket(port, token=start).status == 409


def test_a_websocket_while_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """When Redis is away a websocket with a cookie is refused with 503 and Retry-After; one without opens."""

    async def accept(session: Any, websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    away = AsyncStillroom(Settings(redis_url="redis://127.0.0.1:1", session_peppers="p" * 40))
    import uvicorn

    config = uvicorn.Config
    monkeypatch.setattr(
        uvicorn, "Config", lambda app, **given: config(app, **given | {"ws": "wsproto"})
    )
    with serving_asgi(sockets(accept), away) as port:
        refused = Socket(port, token="00." + "A" * 43)
        assert (refused.status, refused.headers["retry-after"]) == (503, "2")
        assert Socket(port).status == 101


def test_a_server_that_can_t_answer_a_handshake_closes_it(async_room: AsyncStillroom) -> None:
    """A server that cannot refuse a handshake closes it: 1013 to try later, 1008 for another site's page."""
    away = AsyncStillroom(Settings(redis_url="redis://127.0.0.1:1", session_peppers="p" * 40))
    messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await scope["stillroom.session"].load()

    async def send(message: Any) -> None:
        messages.append(message)

    cookie = (b"cookie", f"{COOKIE}=00.{'A' * 43}".encode())
    scope = {"type": "websocket", "path": "/ws", "headers": [cookie], "scheme": "ws"}
    asyncio.run(StillroomMiddleware(app, away)(scope, None, send))  # type: ignore[arg-type]
    foreign = {**scope, "headers": [(b"origin", b"https://evil.example"), (b"host", b"shop")]}
    guard = StillroomMiddleware(app, async_room, same_origin=True)
    asyncio.run(guard(foreign, None, send))  # type: ignore[arg-type]
    assert [message["code"] for message in messages] == [1013, 1008]


@pytest.mark.parametrize(
    ("asgi", "times"),
    [({"version": "3.0"}, 1), ({"version": "3.0", "spec_version": "2.3"}, 0), (None, 0)],
)
def test_a_websocket_s_cookie_that_a_server_leaves_out_is_told(
    room: Stillroom,
    async_room: AsyncStillroom,
    caplog: pytest.LogCaptureFixture,
    asgi: dict[str, str] | None,
    times: int,
) -> None:
    """Where a server, as daphne, sends no headers with a websocket's acceptance, a lost cookie is logged once.

    A websocket that only changes a session loses nothing.
    """
    _tell_of_loss.cache_clear()
    token = room.sessions.create("ann").token

    async def act(scope: Any, _: Any, send: Any) -> None:
        session = scope["stillroom.session"]
        await session.load()
        session["n"] = 1
        await send({"type": "websocket.accept"})

    async def serve() -> None:
        for headers in ([(b"cookie", f"{COOKIE}={token}".encode())], [], []):
            scope = {"type": "websocket", "path": "/ws", "headers": headers, "scheme": "wss"}
            scope |= {} if asgi is None else {"asgi": asgi}
            await StillroomMiddleware(act, async_room)(scope, None, sent)  # type: ignore[arg-type]
            said.append(caplog.text.count("is lost"))

    async def sent(message: Any) -> None:
        messages.append(message["type"])

    said: list[int] = []
    messages: list[str] = []
    asyncio.run(serve())
    assert messages == ["websocket.accept"] * 3
    assert said == [0, times, times]


# Another site's page


def test_another_sites_page_is_refused(async_room: AsyncStillroom, room: Stillroom) -> None:
    """A POST or websocket from another site's page is refused; the visitor's own goes on."""
    token = room.sessions.create("ann").token
    with serving_asgi(
        lambda room: shop(room, same_origin=["https://app.example"]), async_room
    ) as port:
        ann = Browser(port, token)
        evil = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
        reply = ann.get("/login/bob", "POST", evil)
        assert (reply.status, reply.one("content-type")) == (403, "application/problem+json")
        assert reply.token is None
        assert ann.get("/me", headers=evil).text == '{"user":"ann"}'
        assert ann.get("/login/ann", "POST", {"Sec-Fetch-Site": "same-origin"}).status == 200
        trusted = {"Sec-Fetch-Site": "cross-site", "Origin": "https://app.example"}
        assert ann.get("/login/ann", "POST", trusted).status == 200


def test_the_first_websocket_of_a_test_client_that_is_refused(async_room: AsyncStillroom) -> None:
    """The first websocket of Starlette's own test client may be one of another site and is refused."""
    with TestClient(shop(async_room, same_origin=True)) as client:
        evil = {"Origin": "https://evil.example"}
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws", headers=evil):
            pass


def test_a_path_is_read_ahead_for_a_bounded_number_of_paths() -> None:
    """Paths are remembered for reading ahead up to a bound, because clients can invent any number."""
    from stillroom.web.scope_session import PATHS, Ahead

    ahead = Ahead()
    for n in range(PATHS + 10):
        ahead.add(f"/{n}")
    assert len(ahead._paths) == PATHS
    assert "/0" not in ahead
    assert f"/{PATHS}" in ahead


def test_a_request_of_the_room_may_begin_and_end_in_two_threads(room: Stillroom) -> None:
    """`with room.request()` may be around a generator that is ended in another context, as FastAPI ends those of
    its dependencies in threads.
    """

    def dependency() -> Iterator[None]:
        with room.request():
            yield

    opened, context = dependency(), contextvars.copy_context()
    context.run(next, opened)
    contextvars.copy_context().run(opened.close)
    assert time_left() is None


def test_what_a_request_has_begun_may_outlive_it(room: Stillroom) -> None:
    """A thread or task that has a request's context is not short of time for Redis when the request is over."""
    token = room.sessions.create("ann").token
    with room.request() as budget:
        context = contextvars.copy_context()
        budget.left = 0.0
        with pytest.raises(SessionStoreUnavailable):
            room.sessions.get(token)
    assert context.run(room.sessions.get, token) is not None


@pytest.mark.parametrize("in_threads", [False, True], ids=["tasks", "threads"])
def test_parts_of_a_request_share_its_session(async_room: AsyncStillroom, in_threads: bool) -> None:
    """Tasks, or threads, of one request that look at its session together all keep what they put there."""
    together = threading.Barrier(4)

    async def begin(request: Request) -> PlainTextResponse:
        (await load_session(request))["begun"] = True
        return PlainTextResponse()

    async def change(request: Request) -> PlainTextResponse:
        def in_thread(name: str) -> None:
            together.wait(10)
            request.session[name] = True

        async def in_task(name: str) -> None:
            (await load_session(request))[name] = True

        names = [f"part{n}" for n in range(4)]
        if in_threads:
            await asyncio.gather(*[asyncio.to_thread(in_thread, name) for name in names])
        else:
            await asyncio.gather(*map(in_task, names))
        return PlainTextResponse()

    async def show(request: Request) -> JSONResponse:
        return JSONResponse(len(await load_session(request)))

    views = {"/begin": begin, "/change": change, "/show": show}
    app = Starlette(routes=[Path_(path, view) for path, view in views.items()])
    with TestClient(wrapped(app, async_room)) as client:
        for path in ("/begin", "/change"):
            assert client.get(path).status_code == 200
        assert client.get("/show").json() == 5
