"""The shop of tests/web/apps.py as servers import it: `application` for WSGI, `asgi` for ASGI.

And `talking`: an app that answers each word a websocket brings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from stillroom import AsyncStillroom, Limit, NoDispatch, Route, Routes, Stillroom
from stillroom.web.asgi import StillroomMiddleware as Asgi
from stillroom.web.wsgi import StillroomMiddleware as Wsgi
from tests.web.apps import asgi_app, wsgi_app

FIFTY = Routes([Route("/plain", [Limit("fifty", 50, 3_600)])], default=[])


def _wsgi() -> Callable[..., Any]:
    room = Stillroom(dispatch=NoDispatch())
    if os.environ.get("USED_BEFORE_THE_FORK"):
        room.sessions.create("parent")
    app = Wsgi(wsgi_app(), room, routes=FIFTY)

    def with_pid(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/pid":
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [json.dumps(os.getpid()).encode()]
        return app(environ, start_response)

    return with_pid


def _asgi() -> Callable[..., Any]:
    app = Asgi(asgi_app(), AsyncStillroom(dispatch=NoDispatch()), routes=FIFTY)

    async def with_pid(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != "/pid":
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": json.dumps(os.getpid()).encode()})

    return with_pid


def _talking() -> Callable[..., Any]:
    async def talk(scope: Any, receive: Any, send: Any) -> None:
        assert "stillroom.session" in scope
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": f"{scope['path']} {message['text']}"})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (talk if scope["type"] == "websocket" else shop)(scope, receive, send)

    shop = asgi_app()
    closed = Routes([Route("/talk", [])], default=[Limit("nobody", 0, 3_600)])
    return Asgi(app, AsyncStillroom(dispatch=NoDispatch()), routes=closed)


def __getattr__(name: str) -> Any:
    return {"application": _wsgi, "asgi": _asgi, "talking": _talking}[name]()
