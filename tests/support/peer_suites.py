"""Other people's own tests of sessions, run against ours: a pytest plugin for a process of its own.

    SUITE=flask python -m pytest -p peer_suites …   # or starlette; its settings come from the environment

It imports nothing of these tests: theirs are a package of the same name.
Before their tests are imported, what they test is replaced: the session interface of every Flask app, Starlette's
SessionMiddleware. Flask, Flask-Login and Starlette are BSD-3-Clause or MIT; their tests are run from their source
distributions and are not copied here.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import _pytest.monkeypatch

from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.web.session_cookie import SessionCookie

# Flask 3.1's conftest.py asks for it under the name it had before pytest 9.
if not hasattr(_pytest.monkeypatch, "notset"):
    _pytest.monkeypatch.notset = _pytest.monkeypatch.NOTSET  # type: ignore[attr-defined]

# Flask-Login's tests make a Version of Python's own and do not use it.
if find_spec("semantic_version") is None:
    sys.modules["semantic_version"] = ModuleType("semantic_version")
    sys.modules["semantic_version"].Version = SimpleNamespace  # type: ignore[attr-defined]


def replace_flasks() -> None:
    import flask

    from stillroom.web.flask import StillroomSessions

    room = Stillroom(Settings(), dispatch=NoDispatch())
    flask.Flask.session_interface = StillroomSessions(room)


def replace_starlettes() -> None:
    import starlette.middleware.sessions as theirs

    from stillroom.web.asgi import StillroomMiddleware

    class SessionMiddleware(StillroomMiddleware):
        """Our middleware under the name of theirs, with the cookie that their test client expects."""

        def __init__(
            self,
            app: Any,
            secret_key: str,
            session_cookie: str = "session",
            max_age: int | None = 1_209_600,
            path: str = "/",
            same_site: str = "lax",
            https_only: bool = False,
            domain: str | None = None,
            partitioned: bool = False,
        ) -> None:
            absolute = 86_400 if max_age is None else max(max_age, 0.001)
            cookie = SessionCookie(
                session_cookie,
                secure=https_only or partitioned,
                same_site=same_site.capitalize(),
                domain=domain,
                path=path,
                partitioned=partitioned,
                persistent=max_age is not None,
            )
            room = AsyncStillroom(Settings(session_absolute=absolute), dispatch=NoDispatch())
            super().__init__(app, room, cookie=cookie)
            self._test_cookie = cookie  # else a test client is spared Secure over http

    theirs.SessionMiddleware = SessionMiddleware  # type: ignore[assignment,misc]


{"flask": replace_flasks, "starlette": replace_starlettes}[os.environ["SUITE"]]()
