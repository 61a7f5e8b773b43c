"""Loads that are overtaken: by an invalidation, a set, a flush, another load, an error.

The one invariant: a read that began after an invalidation returned never yields a value loaded before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from stillroom import AsyncStillroom, Freshness, LoadFailed, Settings, Stillroom
from stillroom.cache.body import CacheBody
from tests.support.entries import Recording, age
from tests.support.held import WITHIN, Held, is_lease_request
from tests.support.stepper import Stepper

Overtake = Callable[[Any, Any], object]

TAGS: list[Any] = ["known", "new", lambda value: [f"found in {value}"]]

# What may overtake a load of `k`: done by another process, or to the server.
BY_TAG: dict[str, Overtake] = {
    "a tag known before": lambda other, client: other.cache.invalidate_by_tag("known"),
    "a tag nobody had used": lambda other, client: other.cache.invalidate_by_tag("new"),
    "a tag found in the value": lambda other, client: other.cache.invalidate_by_tag("found in old"),
    "one tag of many": lambda other, client: other.cache.invalidate_by_tag(
        *[f"other {n}" for n in range(200)], "new"
    ),
    "hard after soft": lambda other, client: [
        other.cache.invalidate_by_tag("new", soft=soft) for soft in (True, False)
    ],
    "the clock is lost": lambda other, client: client.delete(other.keys.clock),
}
BY_KEY: dict[str, Overtake] = {
    "the key": lambda other, client: other.cache.invalidate("k"),
    "a set": lambda other, client: other.cache.set("k", "set"),
    "FLUSHALL": lambda other, client: client.flushall(),
}
EVERY = {**BY_TAG, **BY_KEY}

overtaken = pytest.mark.parametrize("overtake", EVERY.values(), ids=EVERY)


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    """Return threads for acts that stand still while the test goes on."""
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def other(room: Any, make_room: Any) -> Stillroom:
    """Open another process that has invalidated before; the first one knows it."""
    other: Stillroom = make_room()
    other.cache.set("before", 1, tags=["known"])
    other.cache.invalidate_by_tag("known")
    other.cache.set("before", 2, tags=["known"])
    assert room.cache.get("before") == other.cache.get("before") == 2
    return other


def begin(aside: ThreadPoolExecutor, held: Held, call: Any, *args: Any, **how: Any) -> Future[Any]:
    """Start a call that loads and run it to the middle of its loader."""
    future = aside.submit(call, *args, **how)
    held.wait_until_called()
    return future


def begin_load(aside: ThreadPoolExecutor, room: Any, held: Held) -> Future[Any]:
    return begin(aside, held, room.cache.get_or_set, "k", held.load, tags=TAGS, swr=60)


def end(held: Held, future: Future[Any]) -> Any:
    held.let_go()
    return future.result(WITHIN)


def assert_nobody_sees(forbidden: str, *rooms: Any) -> None:
    """Check that no read, plain or detailed, in an old or a new process, sees the value."""
    for room in rooms:
        assert room.cache.get("k") in (None, "set", "new")
        entry = room.cache.get_entry("k")
        assert entry is None or entry.value != forbidden


# A load, and what comes in between


@overtaken
def test_a_load_overtaken_is_not_seen_afterwards(
    room: Any, other: Any, make_room: Any, client: Any, aside: Any, overtake: Overtake
) -> None:
    """A load that an invalidation overtook serves its own caller, who began before, and no later reader."""
    held = Held()
    loading = begin_load(aside, room, held)
    overtake(other, client)
    assert end(held, loading) == "old"
    assert_nobody_sees("old", room, other, make_room())
    expected = "set" if overtake is EVERY["a set"] else "new"
    assert room.cache.get_or_set("k", lambda: "new", tags=TAGS) == expected
    assert other.cache.get("k") == make_room().cache.get("k") == expected


@overtaken
def test_a_registered_load_overtaken_is_not_seen_afterwards(
    room: Any, other: Any, make_room: Any, client: Any, aside: Any, overtake: Overtake
) -> None:
    """The same holds for a loader with a name: no later reader sees the overtaken value."""
    held = Held()

    @room.cache.cached("k", ttl=60, swr=60, tags=TAGS)
    def load() -> str:
        return str(held.load())

    loading = begin(aside, held, load)
    overtake(other, client)
    assert end(held, loading) == "old"
    assert_nobody_sees("old", room, other, make_room())


def test_a_load_overtaken_softly_is_stale(
    room: Any, other: Any, make_room: Any, aside: Any
) -> None:
    """A value whose load a soft invalidation overtook is served as stale to every reader."""
    held = Held()
    loading = begin_load(aside, room, held)
    other.cache.invalidate_by_tag("new", soft=True)
    assert end(held, loading) == "old"
    for reader in (room, other, make_room()):
        assert reader.cache.get("k") == "old"
        assert reader.cache.get_entry("k").freshness is Freshness.STALE


def test_lost_marks_alone_make_nothing_older_true(
    room: Any, other: Any, make_room: Any, client: Any, aside: Any
) -> None:
    """When marks are evicted during an overtaken load, no process takes their absence for consent."""
    held = Held()
    loading = begin_load(aside, room, held)
    other.cache.invalidate_by_tag("new")
    client.delete(room.keys.marks)
    assert end(held, loading) == "old"
    assert_nobody_sees("old", room, other, make_room())
    other.cache.invalidate_by_tag("another")
    assert_nobody_sees("old", room, other, make_room())


# Whoever waits for it


@pytest.mark.parametrize("same_process", [True, False])
@pytest.mark.parametrize("overtake", BY_TAG.values(), ids=BY_TAG)
def test_a_waiter_that_came_after_is_not_served_the_older_load(
    make_room: Any, client: Any, aside: Any, overtake: Overtake, same_process: bool
) -> None:
    """A waiter that came after the invalidation finds the stored value dead and loads itself."""
    first, third = make_room(), make_room()
    second = first if same_process else make_room()
    held = Held()
    loading = begin_load(aside, first, held)
    overtake(third, client)
    body: CacheBody = second._cache_body
    waiter = Stepper(second, body.get_or_set("k", lambda: "new", tags=TAGS)).run()
    assert waiter.is_waiting
    assert end(held, loading) == "old"
    waiter.step()
    assert waiter.value() == "new"
    assert first.cache.get("k") == second.cache.get("k") == third.cache.get("k") == "new"


@pytest.mark.parametrize("same_process", [True, False])
@pytest.mark.parametrize("overtake", BY_KEY.values(), ids=BY_KEY)
def test_after_the_key_was_invalidated_nobody_waits_for_the_older_load(
    make_room: Any, client: Any, aside: Any, overtake: Overtake, same_process: bool
) -> None:
    """After its key was invalidated no caller waits for the older load, whose value is not stored."""
    first, third = make_room(), make_room()
    second = first if same_process else make_room()
    held = Held()
    loading = begin_load(aside, first, held)
    overtake(third, client)
    expected = "set" if overtake is EVERY["a set"] else "new"
    assert second.cache.get_or_set("k", lambda: "new", tags=TAGS) == expected
    assert end(held, loading) == "old"
    assert first.cache.get("k") == second.cache.get("k") == third.cache.get("k") == expected


@pytest.mark.parametrize(("overtaken", "expected"), [(False, "old"), (True, "new")])
def test_a_waiter_is_served_what_may_still_be_served(
    room: Any, other: Any, client: Any, aside: Any, overtaken: bool, expected: str
) -> None:
    """A waiter gets another's value if nothing came in between and its own otherwise, with both faces."""
    held = Held()
    loading = begin_load(aside, other, held)
    if overtaken:
        other.cache.invalidate_by_tag("new")
    watching = Event()
    letting = aside.submit(held.let_go_when_waited_for, client, room.keys.lease(b"k"), watching)
    assert watching.wait(WITHIN)
    assert room.cache.get_or_set("k", lambda: "new", tags=TAGS) == expected
    letting.result(WITHIN)
    assert loading.result(WITHIN) == "old"


def test_tasks_of_one_event_loop_follow_the_same_rule(settings: Settings) -> None:
    """In one event loop a task from before an invalidation gets the old value and one from after it the new one."""

    async def scenario() -> tuple[list[Any], Any]:
        called, let_go = asyncio.Event(), asyncio.Event()

        async def load_old() -> str:
            called.set()
            await let_go.wait()
            return "old"

        async def load_new() -> str:
            return "new"

        async with AsyncStillroom(settings, dispatch=Recording()) as room:
            old = asyncio.ensure_future(room.cache.get_or_set("k", load_old, tags=["t"]))
            await called.wait()
            await room.cache.invalidate_by_tag("t")
            new = [
                asyncio.ensure_future(room.cache.get_or_set("k", load_new, tags=["t"]))
                for _ in range(20)
            ]
            let_go.set()
            return await asyncio.gather(*new), await old

    assert asyncio.run(scenario()) == (["new"] * 20, "old")


# Refreshes


def stale_entry(room: Any, dispatch: Recording, client: Any, held: Held) -> Any:
    """Store `first` by a loader that then stands still, make it stale, and return the order to refresh it."""
    values = iter([lambda: "first", held.load])

    @room.cache.cached("k", ttl=60, swr=600, tags=TAGS)
    def load() -> str:
        return str(next(values)())

    load()
    age(client, room.keys.entry(b"k"), 61)
    assert load() == "first"
    (order,) = dispatch.orders
    return order


@overtaken
def test_a_refresh_overtaken_brings_nothing_back(
    room: Any,
    other: Any,
    make_room: Any,
    client: Any,
    aside: Any,
    dispatch: Recording,
    overtake: Overtake,
) -> None:
    """After an overtaken refresh neither the stale nor the loaded value is seen."""
    held = Held()
    order = stale_entry(room, dispatch, client, held)
    refreshing = begin(aside, held, room.cache.refresh, order)
    if overtake is EVERY["a tag found in the value"]:  # the stale one's own
        other.cache.invalidate_by_tag("found in first")
    overtake(other, client)
    outcome = end(held, refreshing)["outcome"]
    assert outcome == "lease lost"  # dead on arrival, so it is not even stored
    assert_nobody_sees("old", room, other, make_room())


def test_a_refresh_overtaken_softly_is_stale(
    room: Any, other: Any, client: Any, aside: Any, dispatch: Recording
) -> None:
    """A refresh that a soft invalidation overtook is served as stale and ordered once more."""
    held = Held()
    order = stale_entry(room, dispatch, client, held)
    refreshing = begin(aside, held, room.cache.refresh, order)
    other.cache.invalidate_by_tag("known", soft=True)
    assert end(held, refreshing)["outcome"] == "refreshed"
    entry = other.cache.get_entry("k")
    assert (entry.value, entry.freshness) == ("old", Freshness.STALE)
    assert other.cache.get("k") == "old"
    assert len(dispatch.orders) == 2


@overtaken
def test_a_refresh_by_a_reader_overtaken_brings_nothing_back(
    room: Any, other: Any, make_room: Any, client: Any, aside: Any, overtake: Overtake
) -> None:
    """An overtaken refresh by a reader, where no worker can load, brings nothing back either."""
    room.cache.get_or_set("k", lambda: "first", ttl=60, swr=600, tags=TAGS)
    age(client, room.keys.entry(b"k"), 61)
    held = Held()
    loading = begin_load(aside, room, held)
    if overtake is EVERY["a tag found in the value"]:
        other.cache.invalidate_by_tag("found in first")
    overtake(other, client)
    assert end(held, loading) == "old"
    assert_nobody_sees("old", room, other, make_room())


def test_a_load_takes_over_from_a_refresh(
    room: Any, other: Any, client: Any, aside: Any, dispatch: Recording
) -> None:
    """A load takes over from a refresh whose stale value is gone, and the late refresh does not overwrite it."""
    held = Held()
    order = stale_entry(room, dispatch, client, held)
    refreshing = begin(aside, held, room.cache.refresh, order)
    client.delete(room.keys.entry(b"k"))
    assert other.cache.get_or_set("k", lambda: "new") == "new"
    assert end(held, refreshing)["outcome"] == "lease lost"
    assert other.cache.get("k") == "new"


# Leases


def test_a_load_longer_than_its_lease_is_not_stored(
    room: Any, other: Any, client: Any, aside: Any
) -> None:
    """A load longer than its lease is not stored; the second loader's lease and value stay, whichever
    ends first.
    """
    lease = room.keys.lease(b"k")
    slow, second = Held(), Held("second")
    slow_load = begin_load(aside, room, slow)
    client.delete(lease)  # it has run out
    second_load = begin_load(aside, other, second)
    held_by_second = client.get(lease)
    assert end(slow, slow_load) == "old"
    assert client.get(lease) == held_by_second
    assert client.exists(room.keys.entry(b"k")) == 0
    assert end(second, second_load) == "second"
    assert client.exists(lease) == 0
    assert room.cache.get("k") == other.cache.get("k") == "second"


def test_a_load_that_ends_after_its_successor_is_not_stored(
    room: Any, other: Any, client: Any, aside: Any
) -> None:
    """The value of the load that began later stays, when the earlier one ends last."""
    slow = Held()
    slow_load = begin_load(aside, room, slow)
    client.delete(room.keys.lease(b"k"))
    assert other.cache.get_or_set("k", lambda: "second") == "second"
    assert end(slow, slow_load) == "old"
    assert room.cache.get("k") == other.cache.get("k") == "second"


def test_a_failing_load_does_not_free_its_successors_lease(
    room: Any, other: Any, client: Any, aside: Any
) -> None:
    """A failing load gives back its own lease and not its successor's."""
    lease = room.keys.lease(b"k")
    failing, second = Held(LookupError("gone")), Held("second")
    failing_load = begin_load(aside, room, failing)
    client.delete(lease)
    second_load = begin_load(aside, other, second)
    with pytest.raises(LookupError, match="gone"):
        end(failing, failing_load)
    assert client.exists(lease) == 1
    assert end(second, second_load) == "second"
    assert room.cache.get("k") == "second"


class Farewell(BaseException):
    """A BaseException such as KeyboardInterrupt and SystemExit."""


@pytest.mark.parametrize("error", [LookupError("gone"), Farewell("bye")])
def test_a_failing_load_leaves_no_lease(
    room: Any, other: Any, client: Any, aside: Any, error: BaseException
) -> None:
    """A failing load's error reaches its caller, and the next caller loads at once."""
    held = Held(error)
    loading = begin_load(aside, room, held)
    with pytest.raises(type(error)):
        end(held, loading)
    assert client.keys("*:l:*") == []
    assert other.cache.get_or_set("k", lambda: "new") == "new"


def test_a_waiter_is_told_of_a_load_that_fails(
    room: Any, other: Any, client: Any, aside: Any
) -> None:
    """A failing load's error reaches every waiter, and the next caller loads."""
    held = Held(LookupError("gone"))
    loading = begin_load(aside, other, held)
    watching = Event()
    letting = aside.submit(held.let_go_when_waited_for, client, room.keys.lease(b"k"), watching)
    assert watching.wait(WITHIN)
    with pytest.raises(LoadFailed, match="failed with LookupError: gone"):
        room.cache.get_or_set("k", lambda: "new")
    letting.result(WITHIN)
    with pytest.raises(LookupError):
        loading.result(WITHIN)
    assert room.cache.get_or_set("k", lambda: "new") == "new"
    assert other.cache.get("k") == "new"


@pytest.mark.parametrize(
    "tags", [lambda value: [value["no such field"]], lambda value: [""], lambda value: None]
)
def test_a_failing_tag_function_leaves_no_lease(room: Any, client: Any, tags: Any) -> None:
    """A failing tag function leaves no lease, so that nobody waits for it."""
    assert room.cache.get_or_set("k", dict, tags=[tags]) == {}
    assert client.keys("*:l:*") == client.keys("*:e:*") == []


def test_a_failing_tag_function_in_a_refresh_leaves_the_stale_value(
    room: Any, client: Any, dispatch: Recording
) -> None:
    """A failing tag function in a refresh leaves the stale value; the next refresh waits as after a failed one."""
    values = iter([{"shelf": "a"}, {}])

    @room.cache.cached("k", ttl=60, swr=600, tags=[lambda value: [value["shelf"]]])
    def load() -> dict[str, str]:
        return next(values)

    load()
    age(client, room.keys.entry(b"k"), 61)
    load()
    assert dispatch.run_all(room) != ["refreshed"]
    assert client.get(room.keys.lease(b"k")).startswith(b"backoff.")
    assert load() == {"shelf": "a"}


def test_a_load_that_raises_stop_iteration_fails_like_any_other(
    make_room: Any, client: Any
) -> None:
    """A loader that raises StopIteration fails like any other and does not end the operation's generator."""
    with pytest.raises(RuntimeError, match="StopIteration"):
        make_room().cache.get_or_set("k", lambda: next(iter([])))
    assert client.keys("*:l:*") == []


def test_a_load_in_a_thread_that_raises_stop_iteration_ends(
    settings: Settings, client: Any
) -> None:
    """A loader in a thread that raises StopIteration reaches its caller, though a future cannot hold it."""

    async def scenario() -> None:
        async with AsyncStillroom(settings, dispatch=Recording()) as room:
            async with asyncio.timeout(WITHIN / 5):
                await room.cache.get_or_set("k", lambda: next(iter([])))

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(scenario())
    assert client.keys("*:l:*") == []


def test_a_load_that_is_cancelled_leaves_no_lease(settings: Settings, client: Any) -> None:
    """A load cancelled because its client hung up leaves no lease."""

    async def scenario() -> None:
        called = asyncio.Event()

        async def load() -> str:
            called.set()
            await asyncio.Event().wait()
            return "never"

        async with AsyncStillroom(settings, dispatch=Recording()) as room:
            task = asyncio.ensure_future(room.cache.get_or_set("k", load))
            await called.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert client.keys("*:l:*") == []

    asyncio.run(scenario())


def test_a_lease_request_that_is_cancelled_leaves_no_lease(settings: Settings, client: Any) -> None:
    """A lease request that is cancelled before its reply arrives gives the lease back."""

    async def scenario() -> None:
        granted = asyncio.Event()

        async with AsyncStillroom(settings, dispatch=Recording()) as room:
            await room.cache.get_or_set("warm", lambda: 1)  # the scripts are loaded
            execute = room.wire.execute

            async def slow_to_arrive(commands: Any, left: float, **how: Any) -> Any:
                replies = await execute(commands, left, **how)
                if is_lease_request(commands[0]):
                    granted.set()
                    await asyncio.Event().wait()
                return replies

            room.wire.execute = slow_to_arrive  # type: ignore[method-assign]
            task = asyncio.ensure_future(room.cache.get_or_set("k", lambda: "never"))
            await granted.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert client.keys("*:l:*") == []

    asyncio.run(scenario())
