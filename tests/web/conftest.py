"""Serve the shop of apps.py behind both middlewares on real HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.web.asgi import StillroomMiddleware as Asgi
from stillroom.web.wsgi import StillroomMiddleware as Wsgi
from tests.support.crowd import PATIENT
from tests.support.emptying import emptied
from tests.support.web import Browser, serving_asgi, serving_wsgi
from tests.web.apps import asgi_app, wsgi_app

Serve = Callable[..., AbstractContextManager[int]]


@pytest.fixture
def server(stillroom_server: EmbeddedServer) -> EmbeddedServer:
    """Start one kind of server; tests/redis checks the scripts on both kinds."""
    return emptied(stillroom_server)


@pytest.fixture(params=["wsgi", "asgi"])
def face(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@contextmanager
def serving(face: str, settings: Settings, *hooks: Any, **options: Any) -> Iterator[int]:
    """Serve the shop with one of the two middlewares and yield the port."""
    if face == "wsgi":
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            with serving_wsgi(Wsgi(wsgi_app(*hooks), room, **options)) as port:
                yield port
        return

    room = AsyncStillroom(settings, dispatch=NoDispatch())
    with serving_asgi(lambda room: Asgi(asgi_app(*hooks), room, **options), room) as port:
        yield port


@pytest.fixture
def serve(face: str, places: dict[str, Any]) -> Serve:
    """Return a function that serves the shop; `hooks` are as in apps.py, `options` are the middleware's."""

    def serve(*hooks: Any, changes: Mapping[str, Any] = {}, **options: Any) -> Any:
        changed = Settings(**{"request_timeout": 30} | PATIENT | places | dict(changes))
        return serving(face, changed, *hooks, **options)

    return serve


@pytest.fixture
def browser(serve: Serve) -> Iterator[Browser]:
    with serve() as port:
        yield Browser(port)


@pytest.fixture
def room(settings: Settings) -> Iterator[Stillroom]:
    """Open a room beside the app's, to read the data that the app wrote."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        yield room
