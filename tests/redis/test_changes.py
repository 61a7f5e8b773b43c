"""add, incr and touch depend on the current entry and on its still being there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from stillroom import InvalidArgument, RedisUnavailable, Settings, Stillroom
from tests.support.entries import age
from tests.support.stepper import Stepper

NEVER = 1 << 62  # seconds


def entry_of(room: Any, key: str) -> bytes:
    name: bytes = room.keys.entry(key.encode())
    return name


def run_to_the_change(stepper: Stepper) -> None:
    """Run the change until it has decided and before its script is sent."""
    while not (isinstance(stepper.at, list) and stepper.at[0][0] == b"EVALSHA"):
        stepper.step()


def finish(stepper: Stepper) -> Any:
    """Finish the change and return its result. Pauses are allowed: they wait for nobody."""
    while not stepper.done:
        stepper.step()
    return stepper.result


def test_add_stores_only_where_there_is_nothing(room: Any, client: Any) -> None:
    """add stores only where nothing is, with the given time and tags; None is a value too."""
    assert room.cache.add("k", {"a": 1}, ttl=60, tags=["t"]) is True
    assert room.cache.add("k", 2) is False
    assert room.cache.get("k") == {"a": 1}
    assert 50 < client.ttl(entry_of(room, "k")) <= 60
    assert room.cache.add("none", None) is True
    assert room.cache.add("none", 1) is False


@pytest.mark.parametrize("how", ["invalidate", "tag", "pattern", "clear", "expiry"])
def test_add_takes_the_place_of_what_is_dead(room: Any, client: Any, how: str) -> None:
    """add replaces an entry that no reader would get."""
    room.cache.set("k", 1, ttl=60, tags=["t"])
    match how:
        case "invalidate":
            room.cache.invalidate("k")
        case "tag":
            room.cache.invalidate_by_tag("t")
        case "pattern":
            room.cache.invalidate_by_pattern("k*")
        case "clear":
            room.cache.clear()
        case _:
            client.delete(entry_of(room, "k"))
    assert room.cache.add("k", 2) is True
    assert room.cache.get("k") == 2


@pytest.mark.parametrize("foreign", [b"junk", b"\t\t", b"1\tx\t" + b"y" * 5_000])
def test_add_takes_the_place_of_foreign_bytes(room: Any, client: Any, foreign: bytes) -> None:
    """add replaces bytes that are no entry and keys that are no string."""
    client.set(entry_of(room, "k"), foreign)
    assert room.cache.add("k", 2) is True
    client.delete(entry_of(room, "k"))
    client.lpush(entry_of(room, "k"), "x")
    assert room.cache.add("k", 3) is True
    assert room.cache.get("k") == 3


def test_of_many_adds_one_wins(make_room: Any) -> None:
    """When eight threads of eight rooms add one key, one gets True, and its value is the stored one."""
    rooms = [make_room() for _ in range(8)]
    for turn in range(20):
        key = f"k{turn}"
        with ThreadPoolExecutor(8) as threads:
            running = [threads.submit(rooms[n].cache.add, key, n) for n in range(8)]
        won = [one.result() for one in running]
        assert won.count(True) == 1
        assert rooms[0].cache.get(key) == won.index(True)


def test_incr_counts(room: Any, client: Any) -> None:
    """incr counts up and down, also in fractions, and keeps the entry's end, tags and place in an index."""
    room.cache.set("n", 41, ttl=60, swr=40, tags=["t"])
    assert room.cache.incr("n") == 42
    assert room.cache.incr("n", 10) == 52
    assert room.cache.incr("n", -52) == 0
    assert room.cache.get("n") == 0
    assert 90 < client.ttl(entry_of(room, "n")) <= 100
    entry = room.cache.get_entry("n")
    assert entry.tags == ("t",)
    assert 50_000 < client.zscore(room.keys.index(b"t"), "n") - 1000 * client.time()[0] <= 101_000
    room.cache.set("f", 0.5)
    assert room.cache.incr("f") == 1.5
    assert room.cache.incr("nothing") is None


def test_incr_refuses_a_sum_that_no_float_can_be(room: Any) -> None:
    """An int of hundreds of digits can't be added to a float, and is added to an int."""
    room.cache.set("f", 0.5)
    with pytest.raises(InvalidArgument, match=r"^by: this int .* float under 'f'.* 1\.8e308"):
        room.cache.incr("f", 10**400)
    assert room.cache.get("f") == 0.5
    room.cache.set("n", 1)
    assert room.cache.incr("n", 10**400) == 10**400 + 1


def test_incr_makes_no_infinity_of_numbers(room: Any) -> None:
    """A sum of two floats that is too large for one is refused, too, and so is `by` that counts nothing."""
    room.cache.set("f", -1.5e308)
    with pytest.raises(InvalidArgument, match=r"float under 'f'.* 1\.8e308"):
        room.cache.incr("f", -1e308)
    for nothing in (float("inf"), float("nan"), True, "1"):
        with pytest.raises(InvalidArgument, match="a number, an int or a finite float"):
            room.cache.incr("f", nothing)
    assert room.cache.get("f") == -1.5e308
    room.cache.set("n", float("inf"))  # it was the app's own
    assert room.cache.incr("n") == float("inf")


@pytest.mark.parametrize("value", [None, "1", True, [1], {"a": 1}])
def test_what_is_no_number_is_not_added_to(room: Any, value: Any) -> None:
    """incr on a value that is no number raises a clear error and leaves the value."""
    room.cache.set("n", value)
    with pytest.raises(TypeError, match="can't be added to"):
        room.cache.incr("n")
    assert room.cache.get("n") == value


def test_no_incr_is_lost(make_room: Any) -> None:
    """No incr is lost when four rooms in four threads make two hundred each."""
    rooms = [make_room() for _ in range(4)]
    rooms[0].cache.set("n", 0)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda room: [room.cache.incr("n") for _ in range(50)], rooms))
    assert rooms[0].cache.get("n") == 200


def test_touch_moves_the_end(room: Any, client: Any) -> None:
    """touch moves the end of an entry as it is, and does nothing to a missing one."""
    room.cache.set("k", {"a": [1]}, ttl=60, tags=["t"])
    age(client, entry_of(room, "k"), 50)
    assert room.cache.touch("k", ttl=600) is True
    entry = room.cache.get_entry("k")
    assert (entry.value, entry.tags) == ({"a": [1]}, ("t",))
    assert 590 < entry.fresh_until - client.time()[0] <= 601
    assert 590 < client.ttl(entry_of(room, "k")) <= 600
    assert room.cache.touch("nothing", ttl=60) is False


@pytest.mark.parametrize("how", ["invalidate", "tag", "pattern", "clear"])
@pytest.mark.parametrize("act", ["incr", "touch", "add"])
def test_an_invalidation_in_between_wins(make_room: Any, how: str, act: str) -> None:
    """An invalidation between the read and the change of a value wins: the old value does not come back."""
    ours, theirs = make_room(), make_room()
    ours.stats.due = NEVER
    ours.cache.set("k", 1, tags=["t"])
    if act == "add":  # judged dead by its end; the invalidation comes before the new one is written
        ours.cache.invalidate("k")
    body = ours._cache_body
    operation = {"incr": body.incr, "touch": body.touch}.get(act, lambda k: body.add(k, 7))("k")
    stepper = Stepper(ours, operation)
    run_to_the_change(stepper)
    {
        "invalidate": lambda: theirs.cache.invalidate("k"),
        "tag": lambda: theirs.cache.invalidate_by_tag("t"),
        "pattern": lambda: theirs.cache.invalidate_by_pattern("k"),
        "clear": theirs.cache.clear,
    }[how]()
    result = finish(stepper)
    assert theirs.cache.get("k") == (7 if act == "add" else None)
    assert act == "add" or how != "invalidate" or not result


def test_a_set_in_between_is_what_is_added_to(make_room: Any) -> None:
    """incr adds to the number that a concurrent set wrote, because it looks again."""
    ours, theirs = make_room(), make_room()
    ours.stats.due = NEVER
    ours.cache.set("n", 1)
    stepper = Stepper(ours, ours._cache_body.incr("n"))
    run_to_the_change(stepper)
    theirs.cache.set("n", 10)
    assert finish(stepper) == 11


@pytest.mark.parametrize("act", ["incr", "touch"])
def test_a_refresh_that_began_before_does_not_overwrite_a_sum(
    make_room: Any, client: Any, dispatch: Any, act: str
) -> None:
    """A refresh under way stores its value behind a `touch`, which changes none, and not behind an `incr`."""
    room = make_room()
    loads = iter((10, 20))
    number = room.cache.cached("n", ttl=60, swr=600, name="number")(lambda: next(loads))
    assert number() == 10
    age(client, entry_of(room, "n"), 61)
    assert number() == 10
    [order] = dispatch.orders
    refresh = Stepper(room, room._cache_body.refresh(order)).run_to_the_load()
    assert room.cache.incr("n") == 11 if act == "incr" else room.cache.touch("n", ttl=60)
    refresh.run()
    assert room.cache.get("n") == (11 if act == "incr" else 20)


def test_redis_away() -> None:
    """When Redis is away add and touch return False and incr raises."""
    with Stillroom(Settings(redis_url="redis://127.0.0.1:1")) as room:
        assert room.cache.add("k", 1) is False
        assert room.cache.touch("k", ttl=1) is False
        with pytest.raises(RedisUnavailable):
            room.cache.incr("k")


def test_the_same_on_shards(make_room: Any) -> None:
    """add, incr and touch work on shards, each key on its own shard."""
    room = make_room(shards=4)
    for n in range(8):
        assert room.cache.add(f"k{n}", n)
        assert room.cache.incr(f"k{n}") == n + 1
        assert room.cache.touch(f"k{n}", ttl=600)
