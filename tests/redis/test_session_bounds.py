"""Every stored session can be read, every key has a TTL, and no record or user harms the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from stillroom import (
    InvalidArgument,
    SessionDataRefused,
    SessionEnded,
    SessionStoreUnavailable,
    SessionUnreadable,
    SettingsError,
    Stillroom,
    StillroomError,
    TooManySessions,
    ValueTooLarge,
)
from stillroom.moving import HASH, Timed
from stillroom.sessions import many
from tests.support.monitor import heard
from tests.support.sessions import age, name_of, record_of

pytestmark = pytest.mark.usefixtures("bounded")
Make = Callable[..., Stillroom]


# What is stored can be read


def nested(depth: int, inside: str = "") -> Any:
    return json.loads("[" * depth + inside + "]" * depth)


@dataclass
class Kept:
    k: Any


HARD: dict[str, Any] = {
    **{f"{depth} lists": nested(depth) for depth in (150, 198, 199, 200, 201, 202, 250)},
    **{f"{depth} lists and a text": nested(depth, f'"{"x" * 500}"') for depth in (100, 200, 201)},
    **{f"a number of {digits} digits": 10 ** (digits - 1) for digits in (4_000, 4_300)},
    **{f"{depth} objects": json.loads('{"a":' * depth + "1" + "}" * depth) for depth in (198, 200)},
    "specials": [float("inf"), -0.0, "\0\u2028\ufffd", {"": None}, 2**63, -(10**300)],
}
WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "create": lambda sessions, value: sessions.create("u1", {"k": value}),
    "update": lambda sessions, value: _changed(
        sessions, lambda one: sessions.update(one, {"k": value})
    ),
    "mutate": lambda sessions, value: _changed(
        sessions, lambda one: sessions.mutate(one, lambda data: data | {"k": value})
    ),
    "meta": lambda sessions, value: sessions.create("u1", meta={"k": value}),
    "a dataclass": lambda sessions, value: sessions.create("u1", Kept(value)),
}


def _changed(sessions: Any, change: Callable[[Any], Any]) -> Any:
    session = sessions.create("u1", {"before": 1})
    change(session)
    return session


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("value", HARD.values(), ids=HARD)
def test_what_is_accepted_can_be_read(room: Any, write: str, value: Any) -> None:
    """Accepted data is read whole, in its session and in the list of devices; other data is refused at the call."""
    good = room.sessions.create("u1", meta={"agent": "Firefox"})
    try:
        written = WRITES[write](room.sessions, value)
    except (SessionUnreadable, SessionDataRefused, ValueError):
        assert all(room.sessions.get(one.handle) is None for one in [good])
    else:
        read = room.sessions.get(written)
        assert (read.meta if write == "meta" else read.data)["k"] == value
    assert good.handle in [device.handle for device in room.sessions.list_for_user("u1")]


def test_meta_that_an_older_version_stored_hides_no_device(room: Any, client: Any) -> None:
    """The list of devices leaves out unreadable meta of an older version, and the user still ends every device."""
    deep, good = room.sessions.create("u1"), room.sessions.create("u1")
    client.hset(record_of(room, deep.handle), "_m", "[" * 250 + "]" * 250)
    listed = {device.handle: device.meta for device in room.sessions.list_for_user("u1")}
    assert listed == {deep.handle: {}, good.handle: {}}
    assert room.sessions.end("u1", deep.handle) is True


def test_an_update_is_written_whole_or_not_at_all(room: Any) -> None:
    """An update that removes too many keys is refused before anything is written."""
    session = room.sessions.create("u1", {"secret": 1, "a": 0})
    with pytest.raises(SessionDataRefused, match="9,001 keys to remove, the limit is 1,000"):
        room.sessions.update(session, {"a": 1}, remove=["secret", *(f"k{n}" for n in range(9_000))])
    read = room.sessions.get(session)
    assert (read.data, read.version) == ({"secret": 1, "a": 0}, 1)
    many = ["secret", *(f"k{n}" for n in range(999))]
    assert room.sessions.update(session, {"a": 1}, remove=many) == 2
    assert room.sessions.get(session).data == {"a": 1}


# Every key has an end


ACTS: dict[str, Callable[[Any, Any], Any]] = {
    "get": lambda sessions, one: sessions.get(one),
    "touch": lambda sessions, one: sessions.touch(one),
    "update": lambda sessions, one: sessions.update(one, {"a": 2}),
    "rotate": lambda sessions, one: sessions.rotate(one),
    "rotate twice": lambda sessions, one: sessions.rotate(sessions.rotate(one), grace=0),
    "list": lambda sessions, one: sessions.list_for_user("u1"),
    "login": lambda sessions, one: sessions.create("u1", tags=["t"], max_per_user=2),
    "revoke": lambda sessions, one: sessions.destroy_for_user("u1", keep=one),
    "sweep": lambda sessions, one: sessions.sweep(),
    "destroy": lambda sessions, one: sessions.destroy(one),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("how", ["lost", "without an end"])
def test_every_key_has_an_end_where_an_index_was_lost(
    room: Any, client: Any, monkeypatch: pytest.MonkeyPatch, act: str, how: str
) -> None:
    """The next write gives a TTL to every key that lost it by hand or whose index was deleted."""
    monkeypatch.setattr(many, "BITE", 1)
    session = room.sessions.create("u1", {"a": 1}, tags=["t"])
    for _ in range(3):
        room.sessions.create("u1", tags=["t"])
    indexes = [
        key for pattern in ("*}:x", "*:u:u1", "*:g:t", "*}:clock") for key in client.keys(pattern)
    ]
    for key in indexes:
        client.delete(key) if how == "lost" else client.persist(key)
    ACTS[act](room.sessions, session)
    for key in indexes:
        if how == "without an end" and client.ttl(key) == -1:
            client.expire(key, 100)  # this act did not write there


# One bad record harms nobody else


def spoil(client: Any, key: bytes, how: str) -> None:
    client.delete(key)
    if how == "text":
        client.set(key, "x", ex=100)
    elif how == "list":
        client.lpush(key, "x")
        client.expire(key, 100)
    else:
        client.hset(key, mapping={how: "x", "_u": "u1"})
        client.expire(key, 100)


@pytest.mark.parametrize("how", ["text", "list", "_s", "_to", "_l", "other"])
def test_a_record_that_is_none_harms_nobody_else(room: Any, client: Any, how: str) -> None:
    """A record of another type, or a short one, opens nothing, and lists, logins, logouts and sweeps go on."""
    sessions = room.sessions
    bad, good = sessions.create("u1", tags=["t"]), sessions.create("u1", tags=["t"])
    spoil(client, record_of(room, bad.handle), how)
    assert sessions.get(bad) is None
    assert sessions.touch(bad) is False
    assert sessions.destroy(bad, defer=True) is False
    assert sessions.end("u1", bad.handle) is False
    for write in (lambda: sessions.update(bad, {"a": 1}), lambda: sessions.rotate(bad)):
        with pytest.raises(StillroomError):
            write()
    assert sessions.get(good) is not None
    assert [device.handle for device in sessions.list_for_user("u1")] == [good.handle]
    third = sessions.create("u1", tags=["t"], replaces=bad, max_per_user=2)
    assert sessions.count("u1") == 2
    client.zadd(
        room.keys.due_sessions(int(bad.handle[:2], 16)), {name_of(bad.handle) + b"\nu1\nt": 1}
    )
    assert sessions.sweep()["done"]
    assert sessions.destroy_for_user("u1", keep=bad.token) == 2
    assert sessions.get(third) is None
    assert sessions.destroy_by_tag("t") == 0


FIELDS = {"_u": "\t" * 10, "_c": "9" * 400, "_l": "9" * 400, "_t": "\t", "_a": "9" * 400}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_another_program_wrote_harms_nobody_else(
    room: Any, client: Any, field: str
) -> None:
    """A record with a field that is none can be read or not, and the user's other devices are listed."""
    sessions = room.sessions
    bad, good = sessions.create("u1"), sessions.create("u1")
    client.hset(record_of(room, bad.handle), field, FIELDS[field])
    if (session := sessions.get(bad)) is not None:
        with suppress(SessionUnreadable):
            assert session.device
    assert good.handle in [device.handle for device in sessions.list_for_user("u1")]


NUMBERS = ["_b", "_i", "_l", "_s", "_v", "_x"]


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("nonsense", ["nan", "inf", "9" * 400, "x", ""], ids=lambda text: text[:4])
def test_a_number_that_is_none_is_no_outage(
    room: Any, client: Any, field: str, nonsense: str
) -> None:
    """A record with nonsense for a number is written, has ended, or can't be read; that is no outage."""
    calls: tuple[Callable[[Any], Any], ...] = (
        lambda made: room.sessions.update(made, {"a": 2}),
        room.sessions.get,
        room.sessions.touch,
        room.sessions.rotate,
        room.sessions.destroy,
    )
    for call in calls:
        made = room.sessions.create("u1", {"a": 1})
        client.hset(record_of(room, made.handle), field, nonsense)
        with suppress(SessionEnded, SessionUnreadable):
            call(made)
        room.sessions.destroy_for_user("u1")
        with suppress(SessionUnreadable):
            assert room.sessions.get(made.token) is None


@pytest.mark.parametrize("bytes_said", ["", "x", "nan", "-5", str(2**62)])
def test_the_bytes_of_a_record_are_counted_anew_where_they_are_none(
    room: Any, client: Any, bytes_said: str
) -> None:
    """A record that says nonsense of its size is written to, up to the limit, and says its size from then on."""
    made = room.sessions.create("u1", {"a": 1, "b": "x" * 30})
    key = record_of(room, made.handle)
    right = int(client.hget(key, "_b"))
    client.hset(key, "_b", bytes_said)
    room.sessions.update(made, {"a": 2})
    assert int(client.hget(key, "_b")) == right
    client.hset(key, "_b", bytes_said)
    with pytest.raises(ValueTooLarge):
        room.sessions.update(made, {"c": "x" * (room.settings.session_data_limit - right)})


def test_a_clock_that_is_no_time_keeps_nobody_out(room: Any, client: Any) -> None:
    """A login works, and can be ended, where a shard's clock says no time that can be."""
    key = room.keys.shard(0) + b"clock"
    for nonsense in (b"1e308", b"nan", b"inf", b"9" * 400, str(2**70).encode()):
        room.sessions.destroy_all()
        for shard in range(room.settings.session_shards):
            client.set(room.keys.shard(shard) + b"clock", nonsense, ex=100)
        made = room.sessions.create("u1", {})
        assert room.sessions.get(made) is not None
        room.sessions.destroy_for_user("u1")
        assert room.sessions.get(made) is None
        assert room.sessions.get(room.sessions.create("u1", {})) is not None
    assert client.ttl(key) != -1


@pytest.mark.parametrize("kind", ["string", "hash"])
@pytest.mark.parametrize("index", ["x", "u:u1", "g:t", "clock", "d:u1"])
def test_an_index_that_is_none_keeps_nobody_out(
    room: Any, client: Any, index: str, kind: str
) -> None:
    """A foreign key in the place of an index is replaced by the next login, and keeps nobody from logging out."""
    options = {"tags": ["t"], "device": "a phone"}
    made, ends, goes = (room.sessions.create("u1", **options) for _ in range(3))
    key = room.keys.shard(int(made.handle[:2], 16)) + index.encode()
    client.delete(key)
    client.set(key, "x") if kind == "string" else client.hset(key, "x", "y")
    client.expire(key, 100)
    assert room.sessions.destroy(ends)
    assert room.sessions.end("u1", goes.handle)
    again = room.sessions.create("u1", max_per_user=9, **options)
    for session, lives in ((made, True), (again, True), (ends, False), (goes, False)):
        assert (room.sessions.get(session) is not None) is lives
    assert again.handle in [device.handle for device in room.sessions.list_for_user("u1")]


def test_settings_that_can_not_be_compared_keep_nobody_out(make_room: Make, client: Any) -> None:
    """A foreign key in the place of what processes agree on lets them go on, each with its own shards."""
    first = make_room()
    client.set(first.keys.agreed, "x", ex=100)
    for room in (first, make_room()):
        session = room.sessions.create("u1", tags=["t"])
        assert room.sessions.get(session) is not None
        assert room.sessions.count("u1") == 1
        assert room.sessions.destroy_for_user("u1") == 1
    for ends_all in (lambda s: s.destroy_for_user("u1"), lambda s: s.destroy_all()):
        first.sessions.create("u1")
        assert ends_all(make_room().sessions) == 1  # this process finds out by this very call


@pytest.mark.parametrize("kind", ["string", "hash"])
@pytest.mark.parametrize("index", ["x", "all", "clock"])
def test_an_index_that_is_none_saves_nobody_from_the_end_of_all(
    room: Any, client: Any, index: str, kind: str
) -> None:
    """A foreign key in the place of an index keeps no session alive when all are ended, nor a later one dead."""
    sessions = [room.sessions.create(f"u{number}") for number in range(8)]
    for session in sessions:
        key = room.keys.shard(int(session.handle[:2], 16)) + index.encode()
        client.delete(key)
        client.set(key, "x") if kind == "string" else client.hset(key, "x", "y")
        client.expire(key, 100)
    room.sessions.destroy_all()
    assert [session for session in sessions if room.sessions.get(session)] == []
    again = [room.sessions.create(f"u{number}") for number in range(8)]
    assert all(room.sessions.get(session) for session in again)
    assert room.sessions.destroy_all() >= 8


@pytest.mark.parametrize("index", ["x", "rev"])
def test_an_index_that_is_none_keeps_no_other_shard_from_the_sweep(
    room: Any, client: Any, index: str
) -> None:
    """Where a foreign key is in the place of an index, the sweep says so, and sweeps all other shards."""
    client.set(room.keys.shard(0) + index.encode(), "x", ex=100)
    due = room.keys.due_sessions(7)
    client.zadd(due, {b"gone\nu1\n": 1})
    client.expire(due, 100)
    with pytest.raises(SessionStoreUnavailable, match="wrongtype"):
        room.sessions.sweep()
    assert client.zcard(due) == 0


def test_a_line_that_is_none_does_not_stop_the_sweep(room: Any, client: Any) -> None:
    """The sweep drops a foreign line from the index of due sessions and goes on."""
    made = room.sessions.create("u1", idle=10)
    due = room.keys.due_sessions(int(made.handle[:2], 16))
    client.zadd(due, {"nonsense": 1, "one\nline": 2})
    age(client, room, made.handle, 11)
    assert room.sessions.sweep()["expired"] == 1
    assert not client.exists(due)


# Many


def crowd(room: Any, client: Any, count: int, **fields: str) -> Any:
    """Write `count` sessions of u1 as create does; the first is created for real."""
    first = room.sessions.create("u1")
    record = client.hgetall(record_of(room, first.handle))
    prefix, stamp = room.keys.shard(int(first.handle[:2], 16)), int(record[b"_s"])
    pipe = client.pipeline(transaction=False)
    for n in range(1, count):
        name = b"%043d" % n
        pipe.hset(prefix + b"s:" + name, mapping={**record, "_s": str(stamp + n), **fields})
        pipe.expire(prefix + b"s:" + name, 1_000)
        pipe.zadd(prefix + b"u:u1", {name: stamp + n})
    pipe.execute()
    return first


def longest_script(client: Any, act: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of `act` and how many commands its longest script called."""
    results: list[Any] = []
    scripts = [0]
    for one in heard(client, lambda: results.append(act())):
        if one["client_type"] == "lua":
            scripts[-1] += 1
        else:
            scripts.append(0)
    return results[0], max(scripts)


def test_a_list_is_pages(room: Any, client: Any) -> None:
    """Five thousand sessions of one user are listed and counted without a long script."""
    first = crowd(room, client, 5_000)
    listed, calls = longest_script(client, lambda: room.sessions.list_for_user("u1"))
    assert len({device.handle for device in listed}) == 5_000
    assert first.handle in [device.handle for device in listed]
    assert calls < many.PAGE + 10
    assert room.sessions.count("u1") == 5_000
    newest = room.sessions.list_for_user("u1", limit=250)
    assert {int(device.handle[3:]) for device in newest} == set(range(4_750, 5_000))
    assert len(room.sessions.list_for_user("u1", limit=1)) == 1
    with pytest.raises(SettingsError, match="limit=0: 1 or more"):
        room.sessions.list_for_user("u1", limit=0)


def test_a_list_has_no_gaps_where_sessions_end_between_its_pages(
    make_room: Make, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When sessions of a shown page end, every other session is still listed exactly once."""
    monkeypatch.setattr(many, "PAGE", 7)
    room = make_room()
    crowd(room, client, 50)
    listing = room._sessions_body._listed(b"u1", None)
    seen: list[bytes] = []
    step = listing.send(None)
    try:
        while True:
            answer = room.state.run(_sent(step)) if isinstance(step, list) else None
            step = listing.send(answer)
            if (
                answer is not None
            ):  # whoever begins last is ended as soon as the first pages are read
                for device in room.sessions.list_for_user("u1", limit=1):
                    room.sessions.end("u1", device.handle)
    except StopIteration as stop:
        seen = [name for _, name, _ in stop.value]
    assert len(seen) == len(set(seen)) == 50


def _sent(batch: Any) -> Any:
    return (yield batch)


@pytest.mark.parametrize("on_cap", ["reject", "evict_oldest"])
def test_a_login_among_thousands_is_short(room: Any, client: Any, on_cap: str) -> None:
    """A login among thousands of sessions looks at a bounded number and ends some of the oldest."""
    crowd(room, client, 3_000)
    options = {"max_per_user": 3, "on_cap": on_cap}

    def login() -> Any:
        try:
            return room.sessions.create("u1", **options)
        except TooManySessions as error:
            return error

    made, calls = longest_script(client, login)
    assert calls < 1_000
    if on_cap == "reject":
        assert (made.count, made.limit) == (3_000, 3)
        return
    for _ in range(40):
        made = login()
    assert room.sessions.count("u1") == 3
    assert room.sessions.get(made) is not None


def test_the_dead_among_thousands_keep_nobody_out(room: Any, client: Any) -> None:
    """Any number of expired sessions is deleted in bites and does not stop a login."""
    crowd(room, client, 1_000, _l="1")
    made = room.sessions.create("u1", max_per_user=2, on_cap="reject")
    assert room.sessions.count("u1") == 2
    with pytest.raises(TooManySessions):
        room.sessions.create("u1", max_per_user=2, on_cap="reject")
    assert room.sessions.get(made) is not None


@pytest.mark.parametrize("given", ["3", 1.5, True, 0, float("nan")])
def test_a_number_that_is_none_is_told_where_it_is_given(room: Any, given: Any) -> None:
    """A count that is no whole number is an error of the caller, not of Redis, and nothing is written."""
    session = room.sessions.create("ann", {"a": 1})
    acts: list[Callable[[], Any]] = [
        lambda: room.sessions.create("ann", max_per_user=given),
        lambda: room.sessions.list_for_user("ann", limit=given),
        lambda: room.sessions.update(session, {"a": 2}, if_version=given or -1),
        lambda: room.upkeep.sweep_sessions(limit=given),
        lambda: room.upkeep.scan_abuse(limit=given),
        lambda: room.abuse.bans(given),
    ]
    for act in acts:
        with pytest.raises(
            (SettingsError, InvalidArgument), match=r"limit=|max_per_user=|version="
        ):
            act()
    assert room.sessions.get(session).data == {"a": 1}
    assert room.sessions.count("ann") == 1


def test_a_cap_has_a_limit(room: Any) -> None:
    """A cap above the limit is refused, because counting more would hold up the server."""
    with pytest.raises(SettingsError, match="max_per_user=301: 1 to 300"):
        room.sessions.create("u1", max_per_user=301)


@pytest.mark.parametrize("digits", [1, 19, 20, 400, 5_000])
def test_a_move_copies_a_time_of_any_length(digits: int) -> None:
    """A number in the place of a session's time ends no move, however long it is, also where clocks differ."""
    text = b"9" * digits
    _, moved = Timed(b"", ahead_us=5).value(b"s:x", HASH, [b"_l", text])
    assert moved in (text, b"%d" % (int(text[:20]) + 5))
