"""Serve the shop of tests/web with its state on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from stillroom import NoDispatch, Settings, Stillroom
from tests.support.crowd import PATIENT
from tests.support.web import Browser
from tests.web.conftest import Serve, serving


@pytest.fixture(params=["wsgi", "asgi"])
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def serve(face: str, places: dict[str, Any]) -> Serve:
    """Return a function that serves the shop; see tests/web/conftest.py."""

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
