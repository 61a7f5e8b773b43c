"""One caller of all processes loads, and the others wait: neither in vain, nor for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from stillroom import LoadShed, RedisUnavailable, Stillroom
from stillroom.operation import Timed
from tests.support.entries import age
from tests.support.stepper import Stepper

ASKS: dict[str, Callable[[Stillroom, str], Any]] = {
    "one": lambda room, value: room._cache_body.get_or_set("k", lambda: value),
    "many": lambda room, value: room._cache_body.get_or_set_many(
        ["k"], lambda keys: dict.fromkeys(keys, value)
    ),
}


def asking(room: Stillroom, ask: str, value: str) -> Stepper:
    """Return a call that loads this value if it is its turn."""
    return Stepper(room, ASKS[ask](room, value))


def to_the_lease(call: Stepper) -> Stepper:
    """Run on, until the lease of the load is about to be taken."""
    while not isinstance(call.at, Timed):
        call.step()
    return call


def result(call: Stepper) -> Any:
    """Run the call to its end, with what it waits for."""
    while not call.done:
        call.step()
    value = call.value()
    return value["k"] if isinstance(value, dict) else value


def run_out(call: Stepper, seconds: float) -> Any:
    """Run the call to its end, which is not before so many seconds."""
    began = time.monotonic()
    value = result(call)
    assert time.monotonic() - began > seconds
    return value


@pytest.mark.parametrize("ask", ASKS)
def test_a_caller_waits_for_another_load_as_long_as_the_app_says(make_room: Any, ask: str) -> None:
    """After `wait` seconds a caller loads for itself. It stores nothing: that is still the other load's turn."""
    room, other = make_room(wait=0.05), make_room()
    load = asking(other, "one", "the first").run_to_the_load()
    assert run_out(asking(room, ask, "its own"), 0.05) == "its own"
    assert room.cache.get("k") is None
    assert load.value() == room.cache.get("k") == "the first"


def test_a_load_with_few_places_is_shed_where_it_was_waited_for_in_vain(make_room: Any) -> None:
    """A caller that has waited for `wait` seconds takes no place of its own beside `at_once`."""
    room, other = make_room(wait=0.05), make_room()
    loaders = [one.cache.cached("k", at_once=1, name="k")(lambda: 1) for one in (other, room)]
    calls = [
        Stepper(one, one._cache_body.call(load.loader, (), {}))
        for one, load in zip((other, room), loaders, strict=True)
    ]
    calls[0].run_to_the_load()
    with pytest.raises(LoadShed):
        run_out(calls[1], 0.05)
    assert calls[0].value() == room.cache.get("k") == 1


@pytest.mark.parametrize("ask", ASKS)
def test_a_value_that_came_before_the_lease_is_not_loaded_again(
    make_room: Any, client: Any, ask: str
) -> None:
    """A value that came between the look and the lease is returned, and the lease is free."""
    room = make_room()
    call = to_the_lease(asking(room, ask, "its own"))
    make_room().cache.set("k", "another's")
    assert result(call) == "another's"
    assert client.keys("*:l:*") == []


@pytest.mark.parametrize("ask", ASKS)
def test_a_lease_whose_answer_is_lost_keeps_nobody_waiting(
    make_room: Any, client: Any, ask: str
) -> None:
    """A caller that does not know whether it has the lease loads without Redis, and gives the lease back."""
    room = make_room()
    call = to_the_lease(asking(room, ask, "its own"))
    call.step()
    assert len(client.keys("*:l:*")) == 1
    call.interrupt(RedisUnavailable("closed"))
    assert result(call) == "its own"
    assert client.keys("*:l:*") == []


@pytest.mark.parametrize("ask", ASKS)
def test_a_look_at_another_load_that_fails_is_no_answer(make_room: Any, ask: str) -> None:
    """A caller that waits, and finds Redis away meanwhile, has its value all the same, and stores nothing."""
    room, other = make_room(wait=0.05), make_room()
    load = asking(other, "one", "the first").run_to_the_load()
    call = asking(room, ask, "its own").run()
    assert call.is_waiting
    call.step()
    call.interrupt(RedisUnavailable("closed"))
    assert result(call) == "its own"
    assert load.value() == room.cache.get("k") == "the first"


def test_what_was_refreshed_since_a_look_is_not_refreshed_again(
    make_room: Any, client: Any, dispatch: Any
) -> None:
    """A caller that has read a stale value orders no refresh where another one is done meanwhile."""
    room = make_room()
    loads = iter((1, 2))
    load = room.cache.cached("k", ttl=60, swr=600, name="load")(lambda: next(loads))
    assert load() == 1
    age(client, room.keys.entry(b"k"), 61)
    late = to_the_lease(Stepper(room, room._cache_body.call(load.loader, (), {})))
    room._cache_body.forget_asked()  # a process asks once a second
    assert load() == 1
    assert dispatch.run_all(room) == ["refreshed"]
    assert result(late) == 1
    assert dispatch.orders == []
    assert load() == 2
