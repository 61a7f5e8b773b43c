"""No logout is lost while processes change over one by one to other peppers or another number of shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stillroom import Stillroom
from tests.support.sessions import age, end_grace

pytestmark = pytest.mark.usefixtures("bounded")
OLD, NEW = "o" * 40, "n" * 40
RINGS = {"old": OLD, "old and new": f"{OLD} {NEW}", "new and old": f"{NEW} {OLD}", "new": NEW}
NEIGHBOURS = [
    ("old", "old and new"),
    ("old and new", "new and old"),
    ("new and old", "new"),
    ("old", "new and old"),  # the new one in front at once
    ("old and new", "new"),
]
Make = Callable[..., Stillroom]


@pytest.fixture(params=NEIGHBOURS, ids=" | ".join)
def pair(request: pytest.FixtureRequest, make_room: Make) -> tuple[Any, Any]:
    """Open two processes that run at the same time while peppers are changed."""
    one, other = (make_room(session_peppers=RINGS[name]) for name in request.param)
    return one.sessions, other.sessions


@pytest.fixture(params=["->", "<-"])
def both(request: pytest.FixtureRequest, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """Open two processes in either order."""
    return pair if request.param == "->" else pair[::-1]


def test_a_session_made_by_one_process_is_one_for_the_other(both: tuple[Any, Any]) -> None:
    """A session of one process is read, changed, listed, kept and ended by the other, whatever its pepper."""
    here, there = both
    session = here.create("ann", {"a": 1}, tags=["t"])
    assert there.get(session.token).data == {"a": 1}
    assert there.update(session.token, {"b": 2}) == 2
    assert there.touch(session.token) is True
    assert there.mutate(session.token, lambda data: data | {"c": 3}).version == 3
    assert here.get(session.token).data == {"a": 1, "b": 2, "c": 3}
    assert [device.handle for device in there.list_for_user("ann")] == [session.handle]
    other = here.create("ann")
    assert there.destroy_for_user("ann", keep=session.token) == 1
    assert here.get(other.token) is None
    assert there.destroy(session.token) is True
    assert here.get(session.token) is None


def test_a_session_is_renewed_by_the_other_process(both: tuple[Any, Any], client: Any) -> None:
    """A session that the other process rotated has one good token everywhere, and its old handle still ends it."""
    here, there = both
    session = here.create("ann", {"a": 1})
    fresh = there.rotate(session.token, grace=0)
    again = here.rotate(fresh.token, grace=60)
    for sessions in (here, there):
        assert sessions.get(session.token) is None
        assert sessions.get(fresh.token).data == {"a": 1}
        assert sessions.get(again.token).data == {"a": 1}
    assert there.end("ann", session.handle) is True
    assert here.get(again.token) is None
    assert client.keys("*:u:ann") == []


def test_a_login_replaces_what_the_other_process_made(both: tuple[Any, Any]) -> None:
    """After a login with the other ring of peppers the replaced token opens nothing."""
    here, there = both
    for options in ({}, {"max_per_user": 9, "on_cap": "reject"}):
        for _ in range(4):
            planted = here.create(None)
            session = there.create("ann", replaces=planted.token, **options)
            assert here.get(planted.token) is None
            assert here.get(session.token) is not None
        here.destroy_for_user("ann")


def test_a_device_is_known_under_either_pepper(both: tuple[Any, Any]) -> None:
    """A device that one process has seen is not new to the other, nor told twice while peppers are changed."""
    told: list[str] = []
    for sessions in both:
        sessions.on_event.append(lambda event: told.append(event.kind))
    for sessions in (*both, *both):
        sessions.create("ann", device="phone")
    assert told == []
    both[1].create("ann", device="laptop")
    both[0].create("ann", device="laptop")
    assert told == ["new_device"]


def test_a_replay_is_told_by_either_process(
    both: tuple[Any, Any], make_room: Make, client: Any
) -> None:
    """Either process reports a replay, also where their first peppers differ."""
    here, there = both
    room = make_room()
    events: list[Any] = []
    there.on_event.append(events.append)
    session = here.create("ann")
    here.rotate(session.token, grace=60)
    end_grace(client, room, session.handle)
    assert there.get(session.token) is None
    assert [event.kind for event in events] == ["replayed"]


# Shards


def user_in(room: Any, at_least: int) -> tuple[str, Any]:
    """Return a user whose sessions lie in a shard that the smaller process lacks, and one such session."""
    for n in range(1_000):
        session = room.sessions.create(f"u{n}")
        if int(session.handle[:2], 16) >= at_least:
            return f"u{n}", session
        room.sessions.destroy(session)
    raise AssertionError("no such user")


@pytest.mark.parametrize(("few", "many"), [(16, 64), (1, 2), (16, 256)])
def test_shards_grow_while_processes_change_over(make_room: Make, few: int, many: int) -> None:
    """A process with fewer shards reads, lists, counts and ends sessions of one with more."""
    small, large = make_room(session_shards=few), make_room(session_shards=many)
    small.sessions.create("eve")
    user, session = user_in(large, few)
    assert small.sessions.get(session.token) is not None
    assert [device.handle for device in small.sessions.list_for_user(user)] == [session.handle]
    assert small.sessions.count(user) == 1
    assert small.sessions.count() == 2
    fresh = small.sessions.rotate(session.token, grace=0)
    assert small.sessions.end(user, session.handle) is True
    assert large.sessions.get(fresh) is None
    for end in (
        lambda made: small.sessions.destroy(made.token),
        lambda made: small.sessions.destroy_for_user(user),
        lambda made: small.sessions.destroy_by_tag("t"),
        lambda made: small.sessions.create("eve", replaces=made.token),
    ):
        made = large.sessions.create(user, tags=["t"])
        assert end(made)
        assert large.sessions.get(made) is None


def test_shards_may_be_fewer_again(make_room: Make, client: Any) -> None:
    """After a change to fewer shards, calls on all sessions still find the old ones, and a sweep deletes them."""
    large = make_room(session_shards=64)
    user, session = user_in(large, 16)
    small = make_room()
    assert small.sessions.destroy_for_user(user) == 1
    assert large.sessions.get(session) is None
    brief = large.sessions.create(user, idle=10)
    age(client, large, brief.handle, 11)
    report = make_room().sessions.sweep()
    assert (report["expired"], report["done"]) == (1, True)
    assert not client.keys("*:u:*")


def test_a_small_process_that_spoke_first_learns_of_more_shards(make_room: Make) -> None:
    """A process with fewer shards learns of more on each call, not only at its start."""
    small = make_room()
    assert small.sessions.destroy_for_user("nobody") == 0
    large = make_room(session_shards=64)
    user, session = user_in(large, 16)
    assert small.sessions.destroy_for_user(user) == 1
    assert large.sessions.get(session) is None


def test_a_stranger_s_number_of_shards_is_none(make_room: Make, client: Any) -> None:
    """A number of shards that nothing counts to, written by a stranger, keeps nobody from acting on sessions."""
    room = make_room()
    room.sessions.create("ann")
    client.hset(room.sessions._body._keys.agreed, "session_shards", "9" * 5_000 + "\t1\tstranger")
    assert make_room().sessions.destroy_for_user("ann") == 1
