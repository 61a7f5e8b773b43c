"""A room needs a server that lets its threads run, and for an AsyncStillroom an event loop of asyncio."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from stillroom import API, AsyncStillroom, Misplaced, NoDispatch, Stillroom
from stillroom.background import tell_of_threads


@pytest.fixture(autouse=True)
def told_anew() -> Iterator[None]:
    tell_of_threads.cache_clear()
    yield
    tell_of_threads.cache_clear()


@pytest.mark.parametrize(("has_threads", "times"), [(0, 1), (1, 0), (None, 0)])
def test_uwsgi_without_threads_is_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_threads: int | None,
    times: int,
) -> None:
    """A process of uWSGI without `enable-threads` says once in the log that threads do not run there."""
    if has_threads is not None:  # the module that uWSGI adds, as its Python plugin fills it
        monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(has_threads=has_threads))  # type: ignore[arg-type]
    for _ in range(2):
        Stillroom(dispatch=NoDispatch()).close()
    assert caplog.text.count("enable-threads") == times


@pytest.mark.parametrize(
    "act",
    [
        lambda room: room.__aenter__(),
        lambda room: room.cache.get("k", int),
        lambda room: room.sessions.get("00." + "A" * 43),
        lambda room: room.limits.check("192.0.2.1", [API]),
    ],
    ids=["with", "cache", "sessions", "limits"],
)
def test_an_async_room_outside_of_asyncio_says_so(
    act: Callable[[AsyncStillroom], Coroutine[Any, Any, Any]],
) -> None:
    """What is awaited under Trio, as by `hypercorn -k trio`, is Misplaced, and so is the app's lifespan."""
    with pytest.raises(Misplaced, match="asyncio"):
        act(AsyncStillroom(dispatch=NoDispatch())).send(None)
