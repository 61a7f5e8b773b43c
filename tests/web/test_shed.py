"""When a load found no place, each framework tells the visitor when to come again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from flask import Flask
from werkzeug.test import Client

from stillroom import AsyncStillroom, LoadShed, NoDispatch, Stillroom
from stillroom.web import asgi, wsgi
from stillroom.web.flask import StillroomLimits

AWAY = "redis://127.0.0.1:1"


def shed() -> Any:
    raise LoadShed("prices", 20, 1.5)


def plain_wsgi(environ: Any, start: Any) -> Any:
    return shed()


def streamed_wsgi(environ: Any, start: Any) -> Any:
    start("200 OK", [])
    yield shed()


def by_wsgi(app: Any) -> Any:
    room = Stillroom(AWAY, dispatch=NoDispatch())
    return Client(wsgi.StillroomMiddleware(app, room)).get("/")


async def shed_in_a_task() -> None:
    async with asyncio.TaskGroup() as tasks:
        for _ in range(2):
            tasks.create_task(asyncio.to_thread(shed))


def by_fastapi(view: Any = shed) -> Any:
    app = FastAPI()
    app.get("/")(view)
    app.add_middleware(asgi.StillroomMiddleware, room=AsyncStillroom(AWAY, dispatch=NoDispatch()))
    return TestClient(app).get("/")


def by_flask() -> Any:
    app = Flask("app")
    app.get("/")(shed)
    Stillroom(AWAY, dispatch=NoDispatch()).init_app(app)
    return app.test_client().get("/")


def by_the_limits_of_flask() -> Any:
    app = Flask("app")
    app.get("/")(shed)
    StillroomLimits(app, Stillroom(AWAY, dispatch=NoDispatch()))
    return app.test_client().get("/")


ANSWERS = {
    "WSGI": lambda: by_wsgi(plain_wsgi),
    "a WSGI stream": lambda: by_wsgi(streamed_wsgi),
    "FastAPI": by_fastapi,
    "tasks of FastAPI": lambda: by_fastapi(shed_in_a_task),
    "Flask": by_flask,
    "Flask's limits": by_the_limits_of_flask,
}


@pytest.mark.parametrize("framework", ANSWERS)
def test_a_load_that_is_shed_is_a_503_that_says_when_to_come_again(framework: str) -> None:
    """A shed load is a 503 with Retry-After in whole seconds, rounded up, and no cache keeps it."""
    answer = ANSWERS[framework]()
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "2"
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_an_app_of_flask_may_answer_it_in_its_own_words() -> None:
    """A Flask app's own error handler for a shed load wins, registered before or after."""
    for is_first in (True, False):
        app, room = Flask("app"), Stillroom(AWAY, dispatch=NoDispatch())
        app.get("/")(shed)
        steps = [lambda: app.register_error_handler(LoadShed, lambda _: ("busy", 503))]  # noqa: B023
        steps.insert(0 if not is_first else 1, lambda: room.init_app(app))  # noqa: B023
        for step in steps:
            step()
        assert app.test_client().get("/").text == "busy"


def test_a_websocket_whose_load_is_shed_is_told_to_try_later() -> None:
    """A handshake during which a load is shed is refused with 1013, where the server can only close it."""
    room = AsyncStillroom(AWAY, dispatch=NoDispatch())
    messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        shed()

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {"type": "websocket", "path": "/ws", "headers": [], "scheme": "ws"}
    asyncio.run(asgi.StillroomMiddleware(app, room)(scope, None, send))  # type: ignore[arg-type]
    assert [message["code"] for message in messages] == [1013]
