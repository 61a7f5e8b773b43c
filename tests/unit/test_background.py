"""A room's threads need a server that lets them run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from stillroom import NoDispatch, Stillroom
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
