"""Bulk calls: many keys take one round trip and one load, and each key fails for itself."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import pytest

from stillroom import LoadFailed, RedisUnavailable, ValueTooLarge
from stillroom.cache.bites import KEYS_AT_ONCE
from tests.support.entries import age
from tests.support.stepper import Stepper
from tests.support.threads import at_once


def squares(keys: list[str]) -> dict[str, int]:
    return {key: int(key.partition(":")[2]) ** 2 for key in keys}


def commands(client: Any, act: Any) -> list[str]:
    """Return the names of the commands that clients sent while `act` ran."""
    with client.monitor() as monitor:
        act()
        client.echo("done")
        seen = list(takewhile(lambda c: c["command"] != "ECHO done", monitor.listen()))
    names = [c["command"].split()[0] for c in seen if c["client_type"] != "lua"]
    return [name for name in names if name not in {"HELLO", "CLIENT", "MONITOR"}]


def test_many_are_set_and_read_in_one_round_trip(room: Any, client: Any) -> None:
    """set_many and get_many take one round trip each.

    Stored values come back by key and missing keys are absent.
    """
    assert room.cache.set_many({"a": 1, "b": 2}, ttl=60, tags=["t"]) == {"a": True, "b": True}
    room.stats.due = 1 << 62
    assert room.cache.get_many(["a", "gone", "b"], int) == {"a": 1, "b": 2}
    assert commands(client, lambda: room.cache.get_many(["a", "gone", "b"])) == ["MGET"]
    assert list(room.cache.get_many(["b", "a"])) == ["b", "a"]
    assert (
        room.cache.get_many([]) == room.cache.set_many({}) == room.cache.invalidate_many([]) == {}
    )


def test_what_does_not_fit_the_type_is_absent(room: Any) -> None:
    """A value that does not fit the type is absent, and the other values are returned."""
    room.cache.set_many({"a": 1, "b": "x"})
    assert room.cache.get_many(["a", "b"], int) == {"a": 1}
    assert room.stats.counts["decode_errors"] == 1


def test_one_bad_value_refuses_all_before_anything_is_written(room: Any) -> None:
    """One value that cannot be stored refuses the whole set_many before anything is written."""
    with pytest.raises(ValueTooLarge):
        room.cache.set_many({"a": 1, "b": "x" * 9_000_000})
    assert room.cache.get_many(["a", "b"]) == {}


def test_each_key_fails_for_itself(room: Any, client: Any) -> None:
    """A key whose lease cannot be taken is not stored, and the other keys are."""
    client.hset(room.keys.lease(b"b"), "x", "y")
    client.set(room.keys.clock, "e1.5")
    client.zadd(room.keys.marks, {"~e1": 5})
    client.config_set("maxmemory", 1)
    try:
        assert room.cache.set_many({"a": 1, "b": 2}) == {"a": False, "b": False}
    finally:
        client.config_set("maxmemory", 0)
    assert room.cache.set_many({"a": 1, "b": 2}) == {"a": True, "b": True}


def test_invalidate_many_says_which_were_there(room: Any, client: Any) -> None:
    """invalidate_many returns which keys were there, and forgets loads under way."""
    room.cache.set_many({"a": 1, "b": 2})
    client.set(room.keys.lease(b"c"), "load.someone")
    assert room.cache.invalidate_many(["a", "c", "b"]) == {"a": True, "c": False, "b": True}
    assert client.exists(room.keys.lease(b"c")) == 0
    assert room.cache.get_many(["a", "b"]) == {}


@pytest.mark.parametrize("failing", [{0}, {1}, {0, 1}])
def test_a_bite_that_fails_costs_only_its_own_keys(make_room: Any, failing: set[int]) -> None:
    """Where Redis does not answer one of the bites that many keys are read in, the other values are returned."""
    room = make_room()
    keys = [f"k:{n}" for n in range(KEYS_AT_ONCE + 1)]
    room.cache.set_many({keys[0]: 0, keys[-1]: 1})
    call, bite = Stepper(room, room._cache_body.get_many(keys)), -1
    while not call.done:
        bite += call.is_waiting  # other calls have their turn before each bite
        if call.is_waiting or bite not in failing:
            call.step()
        else:
            call.interrupt(RedisUnavailable("closed"))
    assert bite == 1
    assert set(call.value().values()) == {0, 1} - failing


def test_tags_kill_among_many(room: Any, make_room: Any) -> None:
    """A reader of a hundred keys gets only those whose tags live, also one that remembers few marks."""
    for n in range(100):
        room.cache.set(f"n:{n}", n, tags=[f"mod:{n % 3}"])
    for n in range(300):
        room.cache.invalidate_by_tag(f"other:{n}")
    room.cache.invalidate_by_tag("mod:1")
    expected = {f"n:{n}": n for n in range(100) if n % 3 != 1}
    for reader in (room, make_room(), make_room(marks_limit=100)):
        assert reader.cache.get_many([f"n:{n}" for n in range(100)], int) == expected


def test_the_missing_are_loaded_in_one_call(room: Any) -> None:
    """The loader gets only the missing keys, in one call."""
    calls: list[list[str]] = []

    def load(keys: list[str]) -> dict[str, int]:
        calls.append(keys)
        return squares(keys)

    room.cache.set("n:2", 4)
    keys = ["n:1", "n:2", "n:3"]
    assert room.cache.get_or_set_many(keys, load, ttl=60) == {"n:1": 1, "n:2": 4, "n:3": 9}
    assert room.cache.get_or_set_many(keys, load, ttl=60) == {"n:1": 1, "n:2": 4, "n:3": 9}
    assert calls == [["n:1", "n:3"]]
    assert room.cache.get_or_set_many([], load) == {}


def test_an_async_loader_of_many_is_awaited(room: Any) -> None:
    """An async loader of many keys works with either face."""

    async def load(keys: list[str]) -> dict[str, int]:
        return squares(keys)

    assert room.cache.get_or_set_many(["n:5"], load) == {"n:5": 25}


def test_a_key_the_loader_lacks_is_absent_and_its_lease_free(room: Any, client: Any) -> None:
    """A key that the loader leaves out is absent and has no entry. The next caller loads it again."""
    assert room.cache.get_or_set_many(["n:1", "n:2"], lambda keys: squares(["n:1"])) == {"n:1": 1}
    assert client.keys("*:l:*") == []
    assert room.cache.get_or_set_many(["n:2"], squares) == {"n:2": 4}


def test_a_value_that_cannot_be_stored_does_not_stop_the_others(room: Any, client: Any) -> None:
    """A value that cannot be stored is returned, and the other values are returned and stored."""
    values = {"a": "x" * 9_000_000, "b": "small"}
    assert room.cache.get_or_set_many(["a", "b"], lambda keys: values) == values
    assert room.cache.get_many(["a", "b"]) == {"b": "small"}
    assert client.keys("*:l:*") == []


def test_the_loaders_error_frees_every_lease(room: Any, client: Any) -> None:
    """A loader's error reaches its caller and frees every lease, so that nobody waits for the failed load."""

    def fail(keys: list[str]) -> dict[str, int]:
        raise LookupError("no")

    with pytest.raises(LookupError):
        room.cache.get_or_set_many(["n:1", "n:2"], fail)
    assert client.keys("*:l:*") == []


def test_stale_ones_are_served_and_refreshed_with_the_missing(room: Any, client: Any) -> None:
    """One call loads the missing and the stale keys. When the loader fails, the stale values are served."""
    calls: list[list[str]] = []

    def load(keys: list[str]) -> dict[str, int]:
        calls.append(keys)
        return {key: value + 1000 for key, value in squares(keys).items()}

    room.cache.get_or_set_many(["n:1", "n:2"], squares, ttl=60, swr=600)
    age(client, room.keys.entry(b"n:1"), 61)
    found = room.cache.get_or_set_many(["n:1", "n:2", "n:3"], load, ttl=60, swr=600)
    assert found == {"n:1": 1001, "n:2": 4, "n:3": 1009}
    assert sorted(calls[0]) == ["n:1", "n:3"]
    age(client, room.keys.entry(b"n:1"), 61)

    def fail(keys: list[str]) -> dict[str, int]:
        raise LookupError("no")

    assert room.cache.get_or_set_many(["n:1"], fail, ttl=60, swr=600) == {"n:1": 1001}


def test_the_refreshes_of_a_batch_are_one_task(room: Any, dispatch: Any, client: Any) -> None:
    """Stale values that are read together are refreshed by one task."""

    @room.cache.cached("n:{n}", ttl=60, swr=600)
    def load(n: int) -> int:
        return n

    for n in range(30):
        load(n)
        age(client, room.keys.entry(b"n:%d" % n), 61)
    keys = [f"n:{n}" for n in range(30)]
    assert len(room.cache.get_many(keys, int)) == 30
    assert (dispatch.messages, len(dispatch.orders)) == (1, 30)
    assert room.cache.get_many(keys, int)
    assert len(dispatch.orders) == 30
    assert dispatch.run_all(room) == ["refreshed"] * 30


def test_overlapping_batches_load_each_key_once(make_room: Any) -> None:
    """When eight callers ask for overlapping keys, each key is loaded by one of them and the others wait."""
    loaded: list[str] = []
    rooms = [make_room() for _ in range(8)]

    def load(keys: list[str]) -> dict[str, int]:
        loaded.extend(keys)
        return squares(keys)

    def work(n: int) -> dict[str, int]:
        keys = [f"n:{k}" for k in range(n, n + 10)]
        found: dict[str, int] = rooms[n].cache.get_or_set_many(keys, load, ttl=60)
        return found

    results = at_once(8, work)
    assert sorted(loaded) == sorted(set(loaded))
    assert all(result == squares(list(result)) and len(result) == 10 for result in results)


class Lazy(dict[str, int]):
    """A mapping that makes its values when they are read, and can't."""

    def __getitem__(self, key: str) -> int:
        raise LookupError("no")


def test_a_lazy_mapping_that_fails_is_a_load_that_failed(room: Any, client: Any) -> None:
    """A mapping whose values fail when they are read leaves no lease, so the next call loads at once."""
    with pytest.raises(LookupError):
        room.cache.get_or_set_many(["n:1", "n:2"], lambda keys: Lazy(dict.fromkeys(keys, 1)))
    assert not client.exists(room.keys.lease(b"n:1"), room.keys.lease(b"n:2"))
    assert room.cache.get_or_set_many(["n:1", "n:2"], squares) == {"n:1": 1, "n:2": 4}


def test_whoever_waits_for_a_failed_load_is_told_and_the_next_call_loads(
    make_room: Any, client: Any
) -> None:
    """A caller that waits for another's failed load gets its error at once, and its own loads are stored."""
    one, two = make_room(), make_room()
    began, finish = threading.Event(), threading.Event()

    def fail(keys: Sequence[str]) -> dict[str, int]:
        began.set()
        finish.wait(10)
        raise LookupError("no")

    def first() -> None:
        with pytest.raises(LookupError):
            one.cache.get_or_set_many(["n:1", "n:2"], fail)

    def second() -> None:
        with pytest.raises(LoadFailed, match="failed with LookupError: no"):
            two.cache.get_or_set_many(["n:2", "n:3"], squares)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    began.wait(10)
    threads[1].start()
    while not client.exists(two.keys.entry(b"n:3")):  # it has loaded its own, and waits
        threads[1].join(0.005)
    finish.set()
    for thread in threads:
        thread.join()
    assert two.cache.get_many(["n:2", "n:3"]) == {"n:3": 9}
    assert two.cache.get_or_set_many(["n:2", "n:3"], squares) == {"n:2": 4, "n:3": 9}
    assert two.cache.get_many(["n:2", "n:3"]) == {"n:2": 4, "n:3": 9}
