"""A command that is sent twice acts once, and a copy that a proxy delivers late changes nothing newer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stillroom import NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.scripts import add, clear, lease_load, mark, put, replace
from tests.support.clocked import misjudge
from tests.support.faces import FACES, open_room
from tests.support.lag import Stopwatch
from tests.support.proxy import Proxy

COMMAND_S = 0.5  # what a batch may take: longer than usual, for a busy machine


@pytest.fixture
def proxy(server: EmbeddedServer) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture(params=FACES)
def app(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[Any]:
    """Open a process behind the proxy, with an idle connection and loaded scripts."""
    patience = {"connect_timeout": 5.0, "command_timeout": COMMAND_S, "call_timeout": 5.0}
    with open_room(request.param, Settings(redis_url=proxy.url, **patience), NoDispatch()) as room:
        room.cache.get_or_set("warm", lambda: 1, tags=["warm"])
        room.cache.set("warm", 1)
        room.cache.add("warm", 1)
        room.cache.touch("warm")
        room.cache.invalidate_by_tag("warm")
        room.cache.clear()
        room.cache.set("warm", 1)
        assert room.cache.get("warm") == 1
        yield room


@pytest.fixture
def other(make_room: Any) -> Stillroom:
    """Open another process with a better network."""
    room: Stillroom = make_room()
    room.cache.get("warm")
    return room


def test_a_set_whose_connection_died_says_so_when_it_can_no_longer_act(
    app: Any, proxy: Proxy, other: Stillroom
) -> None:
    """A set whose connection died returns once its copy can no longer act, so that later invalidations hold."""
    proxy.keep(put.text.sha)
    began = time.monotonic()
    assert app.cache.set("k", "v1", tags=["t"], ttl=600) is False
    assert time.monotonic() - began >= COMMAND_S * 0.9
    other.cache.invalidate_by_tag("t")
    proxy.deliver_late()
    assert other.cache.get("k") is None


@pytest.mark.parametrize("many", [False, True])
def test_an_older_set_does_not_overwrite_a_newer_one(app: Any, proxy: Proxy, many: bool) -> None:
    """A late copy of an older set does not overwrite a newer one of the same thread."""

    def store(value: str) -> None:
        app.cache.set_many({"k": value}) if many else app.cache.set("k", value)

    proxy.keep(put.text.sha)
    store("v1")
    store("v2")
    proxy.deliver_late()
    assert app.cache.get("k") == "v2"


def test_a_lease_that_was_asked_for_is_not_taken_once_more(
    app: Any, proxy: Proxy, other: Stillroom
) -> None:
    """A copy of a lease request does not take back a lease that an invalidation removed."""
    database = {"k": "v1"}

    def load() -> str:
        value = database["k"]
        database["k"] = "v2"
        other.cache.invalidate("k")
        if proxy.has_kept:
            proxy.deliver_late()
        return value

    proxy.keep(lease_load.text.sha)
    app.cache.get_or_set("k", load, ttl=600)
    assert other.cache.get("k") in (None, "v2")
    assert app.cache.get_or_set("k", lambda: database["k"], ttl=600) == "v2"


@pytest.mark.parametrize("how", ["tag", "soft tag", "pattern", "key"])
def test_an_invalidation_that_arrives_twice_forgets_no_other(
    app: Any, proxy: Proxy, other: Stillroom, how: str
) -> None:
    """A late copy of an invalidation keeps other invalidations; newer entries may at most be missing."""
    acts: dict[str, Callable[[], Any]] = {
        "tag": lambda: app.cache.invalidate_by_tag("a"),
        "soft tag": lambda: app.cache.invalidate_by_tag("a", soft=True),
        "pattern": lambda: app.cache.invalidate_by_pattern("a*"),
        "key": lambda: app.cache.invalidate("a"),
    }
    other.cache.set("k", "old", tags=["t"])
    proxy.keep(b"UNLINK" if how == "key" else mark.text.sha)
    acts[how]()
    other.cache.invalidate_by_tag("t")
    proxy.deliver_late()
    assert other.cache.get("k") is app.cache.get("k") is None


def test_a_clear_that_arrives_twice_is_one(app: Any, proxy: Proxy, other: Stillroom) -> None:
    """A clear that arrives twice acts once: newer entries live and newer invalidations hold."""
    proxy.keep(clear.text.sha)
    app.cache.clear()
    other.cache.set("living", 1)
    other.cache.set("dead", 1, tags=["t"])
    other.cache.invalidate_by_tag("t")
    proxy.deliver_late()
    assert app.cache.get_many(["living", "dead"]) == {"living": 1}
    assert other.cache.get_many(["living", "dead"]) == {"living": 1}


def test_a_late_clear_revives_nothing(app: Any, proxy: Proxy, other: Stillroom) -> None:
    """A late copy of a clear begins a third epoch and revives nothing."""
    other.cache.set("first", 1)
    proxy.keep(clear.text.sha)
    app.cache.clear()
    other.cache.set("second", 1)
    other.cache.clear()
    proxy.deliver_late()
    for room in (app, other):
        assert room.cache.get_many(["first", "second"]) == {}


def test_what_is_added_once_is_not_added_again(app: Any, proxy: Proxy, other: Stillroom) -> None:
    """A copy of a failed incr, touch or add does nothing later."""
    app.cache.set("n", 5, ttl=600)
    proxy.keep(replace.text.sha)
    with pytest.raises(Exception, match="unavailable"):
        app.cache.incr("n")
    proxy.deliver_late()
    assert app.cache.get("n") == 5
    proxy.keep(add.text.sha)
    assert app.cache.add("lock", 1) is False
    proxy.deliver_late()
    assert other.cache.get("lock") is None


def test_two_threads_do_not_wait_for_each_others_late_copies(
    app: Any, proxy: Proxy, make_room: Any
) -> None:
    """A cut connection delays its own caller only, and other threads go on."""
    if not isinstance(app, Stillroom):
        pytest.skip("a blocking call")
    proxy.keep(put.text.sha)
    waiting = threading.Thread(target=lambda: app.cache.set("k", 1))
    waiting.start()
    with Stopwatch() as watch:
        assert app.cache.set("other", 1)
    assert watch.seconds < COMMAND_S / 2
    waiting.join()


@pytest.mark.parametrize("seconds", [-3_600.0, -1.0, 1.0, 3_600.0])
def test_a_clock_that_is_not_where_it_was_thought_to_be_refuses_nothing_for_long(
    app: Any, seconds: float
) -> None:
    """A write refused by a wrong estimate of the clock is made again by a right one."""
    misjudge(app.wire.server, seconds)
    assert app.cache.set("k", 1)
    misjudge(app.wire.server, seconds)
    assert app.cache.set_many({"a": 1, "b": 2}) == {"a": True, "b": True}
    misjudge(app.wire.server, seconds)
    assert app.cache.add("c", 1)
    misjudge(app.wire.server, seconds)
    assert app.cache.touch("c")
    misjudge(app.wire.server, seconds)
    assert app.cache.incr("c") == 2
    misjudge(app.wire.server, seconds)
    assert app.cache.get_or_set("d", lambda: 1) == app.cache.get("d") == 1
