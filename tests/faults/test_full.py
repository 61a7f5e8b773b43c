"""A server whose memory is full still invalidates, which is how it gets memory back.

One that takes no writes is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from redis.exceptions import ResponseError

from stillroom import NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.errors import RedisRefused
from stillroom.repair import Repair
from stillroom.scripts import Script, Text, clear, mark
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room
from tests.support.full_disk import REFUSALS, take_writes


@pytest.fixture(params=["flags", "no flags"])
def room(
    request: pytest.FixtureRequest, own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stillroom]:
    """Open a room that sends scripts with flags, or without, as to Redis 6.2."""
    monkeypatch.setattr(Script, "flags_are_known", request.param == "flags")
    settings = Settings(**{**PATIENT, "redis_url": own_server.url})
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        yield room


def fill_up(room: Stillroom) -> None:
    """Write entries, then allow no more memory."""
    room.cache.set_many({f"k:{n}": "x" * 1000 for n in range(200)}, tags=["t"])
    room.wire.execute([(b"CONFIG", b"SET", b"maxmemory", b"1")], 5.0)
    with pytest.raises(RedisUnavailable, match="oom"):
        room.wire.execute([(b"SET", b"one", b"more")], 5.0)


def test_invalidations_and_reclaim_work_when_memory_is_full(room: Stillroom) -> None:
    """Invalidations by tag, pattern, key and clear work when memory is full, though nothing can be stored."""
    fill_up(room)
    assert not room.cache.set("new", 1)
    assert room.cache.get("k:1") == "x" * 1000
    assert room.cache.invalidate("k:0") == 1
    room.cache.invalidate_by_pattern("k:1*")
    assert room.cache.get("k:1") is None
    room.cache.invalidate_by_tag("t")
    assert room.cache.get("k:2") is None
    room.cache.clear()
    assert room.cache.trim_marks()["left"] >= 1


def test_memory_that_is_full_is_freed_by_reclaim(room: Stillroom) -> None:
    """reclaim frees a full memory of all entries that a tag ended."""
    fill_up(room)
    room.cache.invalidate_by_tag("t")
    report = room.cache.reclaim()  # it can't write down how far it has got
    assert (report["deleted"], report["left"]) == (200, 0)


@pytest.mark.parametrize("flags", ["no-such-flag"])
def test_a_server_that_knows_no_flags_gets_the_scripts_without_them(
    room: Stillroom, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    """Redis 6.2, which refuses scripts with flags, gets them without flags after its first such answer."""
    monkeypatch.setattr(Script, "flags_are_known", True)
    for script in (mark, clear):
        text: Any = Text(script, f"#!lua flags={flags}\n{script.plain.source}")
        monkeypatch.setattr(script, "flagged", text)
    room.cache.set("k", 1, tags=["t"])
    room.cache.invalidate_by_tag("t")
    assert room.cache.get("k") is None
    assert not Script.flags_are_known
    room.cache.set("k", 1)
    room.cache.clear()
    assert room.cache.get("k") is None


@pytest.mark.parametrize(
    "answer",
    [
        "ERR max number of clients reached",
        "ERR unknown command 'SCRIPT'",
        "OOM command not allowed",
    ],
)
def test_other_refusals_say_nothing_about_flags(
    monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """A server that refuses to load a script for another reason costs no process its scripts' flags."""
    monkeypatch.setattr(Script, "flags_are_known", True)
    assert not repair_of_a_mark().goes_on([ResponseError(answer), None])
    assert Script.flags_are_known


@pytest.mark.parametrize(
    "answer",
    [
        "ERR Error compiling script (new function): user_script:1: unexpected symbol near '#'",  # Redis 6.2
        "ERR Unexpected flag in script shebang: allow-oom",
    ],
)
def test_a_refusal_of_the_flags_has_the_script_sent_without_them(
    monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """Both answers by which servers refuse flags have the script sent again, and from then on, without them."""
    monkeypatch.setattr(Script, "flags_are_known", True)
    repair = repair_of_a_mark()
    assert repair.goes_on([ResponseError(answer), None])
    assert not Script.flags_are_known
    assert repair.commands[0] == (b"SCRIPT", b"LOAD", mark.plain.source)


def repair_of_a_mark() -> Repair:
    """Return the repair of a batch whose script the server has lost."""
    lost = RedisRefused("noscript", "", [ResponseError("NOSCRIPT No matching script.")])
    return Repair([mark([b"c", b"m", b"g", b"t"], b"e", 1, b"t:x")], lost, may_repeat=True)


@pytest.mark.parametrize("on_cap", ["evict_oldest", "reject"])
def test_a_login_that_a_full_server_refuses_ends_no_session(room: Stillroom, on_cap: str) -> None:
    """Where a full server refuses a login, the session before it lives on, whatever shard it is in."""
    guests = [room.sessions.create(None, {"n": n}) for n in range(20)]
    fill_up(room)
    for guest in guests:
        with pytest.raises(RedisUnavailable, match="oom"):
            room.sessions.create("ann", replaces=guest, max_per_user=3, on_cap=on_cap)
    for n, guest in enumerate(guests):
        found = room.sessions.get(guest)
        assert found is not None
        assert found.data == {"n": n}
    room.wire.execute([(b"CONFIG", b"SET", b"maxmemory", b"0")], 5.0)
    for guest in guests[:3]:
        assert room.sessions.create("ann", replaces=guest, max_per_user=3, on_cap=on_cap)
        assert room.sessions.get(guest) is None


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("face", FACES)
def test_a_server_that_refuses_all_writes_is_read_by_processes_that_begin(
    room: Stillroom, own_server: EmbeddedServer, refusal: str, face: str
) -> None:
    """A process that starts while nothing can be written serves what is cached, and loads the rest."""
    room.cache.set_many({"a": 1, "b": 2})
    REFUSALS[refusal](own_server)
    with open_room(face, room.settings, NoDispatch()) as later:
        for _ in range(10):  # more refusals would open the breaker
            assert not later.cache.set("c", 3)
        assert later.cache.get("a") == 1
        assert later.cache.get_many(["a", "b"]) == {"a": 1, "b": 2}
        assert later.cache.get_or_set("c", lambda: 3) == 3
        take_writes(own_server)
        assert later.cache.set("c", 3)
