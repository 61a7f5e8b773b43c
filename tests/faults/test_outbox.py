"""An invalidation while Redis is away raises, or is deferred and delivered before this process trusts a read."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stillroom import NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support.celery_process import until
from tests.support.trips import Trips

# A frozen server is noticed soon; a busy machine is not taken for one.
HURRIED: dict[str, Any] = {"command_timeout": 0.7, "call_timeout": 1.0, "probe_delay": 0.05}


@pytest.fixture
def pair(own_server: EmbeddedServer) -> Iterator[tuple[Stillroom, Stillroom]]:
    """Return two processes' rooms on a server that comes back with its data."""
    settings = Settings(**HURRIED, redis_url=own_server.url)
    with (
        Stillroom(settings, dispatch=NoDispatch()) as mine,
        Stillroom(settings, dispatch=NoDispatch()) as other,
    ):
        yield mine, other


INVALIDATIONS: list[Callable[[Stillroom], Any]] = [
    lambda room: room.cache.invalidate("k", defer=True),
    lambda room: room.cache.invalidate_by_tag("t", defer=True),
    lambda room: room.cache.invalidate_by_pattern("k*", defer=True),
    lambda room: room.cache.clear(defer=True),
]


@pytest.mark.parametrize("invalidation", INVALIDATIONS, ids=["key", "tag", "pattern", "clear"])
def test_a_deferred_invalidation_is_true_for_its_process_at_once_and_for_all_when_redis_is_back(
    own_server: EmbeddedServer,
    pair: tuple[Stillroom, Stillroom],
    invalidation: Callable[[Stillroom], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A deferred invalidation holds in its process at once, and for all from the first call that reaches Redis.

    The log says how many were delivered.
    """
    mine, other = pair
    mine.cache.set("k", "old", tags=["t"])
    assert other.cache.get("k") == "old"
    own_server.kill()
    with pytest.raises(RedisUnavailable):
        mine.cache.invalidate_by_tag("t")
    invalidation(mine)
    assert mine.cache.deferred == 1
    assert mine.cache.get("k") is None
    own_server.restart()
    mine.wire.breaker.stop()  # nobody probes: it is the read that delivers
    assert mine.cache.get("k") is None
    assert mine.cache.deferred == 0
    assert other.cache.get("k") is None
    assert "1 deferred invalidations are delivered" in caplog.messages


def test_recovery_delivers_without_a_read(
    own_server: EmbeddedServer, pair: tuple[Stillroom, Stillroom]
) -> None:
    """The prober that finds Redis back delivers deferred invalidations without any read."""
    mine, other = pair
    other.cache.set("k", "old", tags=["t"])
    own_server.kill()
    while not mine.wire.breaker.is_open:
        mine.cache.invalidate_by_tag("t", defer=True)
    mine.cache.invalidate_by_tag("t", defer=True)
    assert mine.cache.deferred == 1
    own_server.restart()
    until(lambda: not mine.cache.deferred, "the delivery")
    until(lambda: not other.wire.breaker.is_open, "the other's recovery")
    assert other.cache.get("k") is None


def test_what_is_deferred_without_an_outage_is_delivered_without_a_read(
    pair: tuple[Stillroom, Stillroom],
) -> None:
    """What a request has deferred because its time for Redis was used up is true for all a moment later."""
    mine, other = pair
    mine.cache.set("k", "old")
    with mine.request() as budget:
        budget.left = 0.0
        mine.cache.invalidate("k", defer=True)
    until(lambda: other.cache.get("k") is None, "the delivery")


def test_a_read_that_cannot_deliver_is_not_trusted(
    own_server: EmbeddedServer, pair: tuple[Stillroom, Stillroom]
) -> None:
    """A read is a miss while Redis refuses the scripts that would deliver an invalidation."""
    mine, other = pair
    mine.cache.set("k", "old", tags=["t"])
    own_server.freeze()
    mine.cache.invalidate_by_tag("t", defer=True)
    own_server.thaw()
    other.wire.execute([(b"CONFIG", b"SET", b"min-replicas-to-write", b"1")], 1.0)
    assert mine.cache.get("k") is None
    assert mine.cache.get_or_set("k", lambda: "new") == "new"
    assert mine.cache.deferred == 1
    other.wire.execute([(b"CONFIG", b"SET", b"min-replicas-to-write", b"0")], 1.0)
    assert mine.cache.get("k") is None
    assert mine.cache.deferred == 0


@pytest.mark.parametrize("lacking", [b"-evalsha", b"-get"], ids=["the script", "inside of it"])
def test_what_will_not_be_mended_is_raised(own_server: EmbeddedServer, lacking: bytes) -> None:
    """A refusal that will not end, such as missing rights, raises instead of deferring."""
    settings = Settings(**HURRIED, redis_url=own_server.url)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.cache.set("k", "old")
        room.wire.execute([(b"ACL", b"SETUSER", b"default", lacking)], 1.0)
        with pytest.raises(RedisUnavailable, match="noperm"):
            room.cache.invalidate_by_tag("t", defer=True)
        assert room.cache.deferred == 0


def test_a_deferred_invalidation_and_a_later_set_of_the_same_key_go_in_order(
    own_server: EmbeddedServer, pair: tuple[Stillroom, Stillroom]
) -> None:
    """A value that is set after a deferred invalidation of its key lives."""
    mine, other = pair
    mine.cache.set("k", "old", tags=["t"])
    own_server.freeze()
    mine.cache.invalidate_by_tag("t", defer=True)
    own_server.thaw()
    assert mine.cache.set("k", "new", tags=["t"])
    assert mine.cache.get("k") == other.cache.get("k") == "new"


def test_the_end_of_the_room_delivers(
    own_server: EmbeddedServer, pair: tuple[Stillroom, Stillroom]
) -> None:
    """`close` delivers deferred invalidations."""
    mine, other = pair
    other.cache.set("k", "old", tags=["t"])
    own_server.freeze()
    mine.cache.invalidate_by_tag("t", defer=True)
    own_server.thaw()
    mine.close()
    assert other.cache.get("k") is None


def test_what_is_lost_at_the_end_is_said(
    own_server: EmbeddedServer,
    pair: tuple[Stillroom, Stillroom],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Deferred invalidations that Redis' absence loses at the end are logged as an error with their number."""
    mine, _ = pair
    own_server.kill()
    mine.cache.invalidate("a", "b", defer=True)
    mine.close()
    assert "2 deferred invalidations are lost" in caplog.text


@pytest.mark.parametrize("redis_is_back", [True, False], ids=["back", "away"])
def test_a_process_that_ends_delivers_or_says_what_is_lost(
    own_server: EmbeddedServer, pair: tuple[Stillroom, Stillroom], redis_is_back: bool
) -> None:
    """A process that exits without `close` delivers deferred invalidations or logs their loss."""
    _, other = pair
    other.cache.set("k", "old", tags=["t"])
    program = textwrap.dedent("""
        import sys
        from stillroom import Stillroom, NoDispatch
        room = Stillroom(dispatch=NoDispatch())
        print("ready", flush=True)
        sys.stdin.readline()
        room.cache.invalidate_by_tag("t", defer=True)
        print(room.cache.deferred, flush=True)
        sys.stdin.readline()
    """)
    environment = {**os.environ, "REDIS_URL": own_server.url}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, text=True, **pipes
    ) as process:
        assert process.stdout.readline() == "ready\n"
        own_server.freeze()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "1\n"
        if redis_is_back:
            own_server.thaw()
        _, errors = process.communicate("\n", timeout=30)
    assert process.returncode == 0
    if redis_is_back:
        assert other.cache.get("k") is None
    else:
        own_server.thaw()
        assert "1 deferred invalidations are lost" in errors


@pytest.mark.parametrize("parent_defers", [False, True])
def test_a_child_of_multiprocessing_that_ends_delivers(
    own_server: EmbeddedServer, pair: tuple[Stillroom, Stillroom], parent_defers: bool
) -> None:
    """A child of multiprocessing leaves by `os._exit`, and delivers its deferred invalidations before."""
    mine, other = pair
    mine.cache.set("k", "old", tags=["t"])
    fork = multiprocessing.get_context("fork")
    deferred, redis_is_back = fork.Event(), fork.Event()

    def invalidate() -> None:
        mine.cache.invalidate_by_tag("t", defer=True)
        mine.wire.breaker.stop()  # nobody probes: it is the end that delivers
        deferred.set()
        redis_is_back.wait(10)

    own_server.freeze()
    if parent_defers:
        mine.cache.invalidate_by_tag("another", defer=True)
    child = fork.Process(target=invalidate)
    child.start()
    assert deferred.wait(10)
    own_server.thaw()
    redis_is_back.set()
    child.join(10)
    assert child.exitcode == 0
    assert other.cache.get("k") is None


def test_a_forked_child_trusts_no_read_before_it_has_delivered_too(
    own_server: EmbeddedServer, pair: tuple[Stillroom, Stillroom]
) -> None:
    """A forked child delivers its inherited invalidations before it trusts a read, though its parent does too."""
    mine, _ = pair
    mine.cache.set("k", "old", tags=["t"])
    own_server.freeze()
    mine.cache.invalidate_by_tag("t", defer=True)
    own_server.thaw()
    child = os.fork()
    if not child:
        os._exit(0 if mine.cache.get("k") is None and not mine.cache.deferred else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert mine.cache.deferred == 1
    assert mine.cache.get("k") is None


def test_many_threads_defer_and_read_and_none_sees_the_old_value(
    own_server: EmbeddedServer,
    pair: tuple[Stillroom, Stillroom],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many threads that defer and then read never see the old value."""
    mine, other = pair
    keys = [f"k:{n}" for n in range(16)]
    mine.cache.set_many(dict.fromkeys(keys, "old"))
    own_server.freeze()
    start, seen, trips = threading.Barrier(16), [], Trips(mine, monkeypatch)

    def act(key: str) -> None:
        start.wait()
        mine.cache.invalidate(key, defer=True)
        seen.append(mine.cache.get(key))

    threads = [threading.Thread(target=act, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    until(lambda: trips.count >= 16, "all to have asked")
    own_server.thaw()
    for thread in threads:
        thread.join()
    assert seen == [None] * 16
    until(lambda: not mine.wire.breaker.is_open, "recovery")
    mine.cache.get("any")
    assert other.cache.get_many(keys) == {}
