"""A plain read of a session, three commands, agrees with the script whatever happens between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from stillroom import Stillroom
from stillroom.sessions import many
from tests.support.monitor import sent
from tests.support.sessions import record_of
from tests.support.stepper import Stepper

Make = Callable[..., Stillroom]
PEPPERS = ["a-pepper-of-thirty-two-bytes-....", "another-of-thirty-two-bytes-....."]
PLAIN = ["EXISTS", "TIME", "HGETALL"]
SCRIPT = ["EVALSHA"]


def revoke(room: Stillroom, session: Any) -> None:
    """End all sessions of the user and leave the records to the workers."""
    assert room.sessions.destroy_for_user("ann") >= 1


ENDS: dict[str, Callable[[Stillroom, Any], Any]] = {
    "destroy": lambda room, session: room.sessions.destroy(session),
    "revoke the user's": revoke,
    "revoke a tag": lambda room, session: room.sessions.destroy_by_tag("mobile"),
    "end all": lambda room, session: room.sessions.destroy_all(),
    "log in": lambda room, session: room.sessions.create("ann", replaces=session),
    "rotate without grace": lambda room, session: room.sessions.rotate(session, grace=0),
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a revocation of more than one session leave its records to the workers."""
    monkeypatch.setattr(many, "BITE", 1)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("steps", range(5))
def test_a_read_begun_after_an_end_shows_nothing_whatever_the_workers_do_meanwhile(
    make_room: Make, end: str, steps: int
) -> None:
    """A read that began after an end shows nothing, though workers delete record and revocation in between."""
    app, worker = make_room(), make_room()
    session = app.sessions.create("ann", {"n": 1}, tags=["mobile"])
    app.sessions.create("ann", tags=["mobile"])
    ENDS[end](app, session)
    reading = Stepper(make_room(), app._sessions_body.get(session.token))
    for _ in range(steps):
        reading.step()
    worker.sessions.sweep()
    assert reading.value() is None


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("steps", range(5))
def test_a_read_that_an_end_overtakes_shows_the_session_as_it_was_or_nothing(
    make_room: Make, end: str, steps: int
) -> None:
    """A read that an end overtakes shows the session as it was or nothing."""
    app = make_room()
    session = app.sessions.create("ann", {"n": 1}, tags=["mobile"])
    app.sessions.create("ann", tags=["mobile"])
    reading = Stepper(make_room(), app._sessions_body.get(session.token))
    for _ in range(steps):
        reading.step()
    ENDS[end](app, session)
    app.sessions.sweep()
    found = reading.value()
    assert found is None or (found.data, found.version) == ({"n": 1}, 1)


def without_plain_reads(room: Stillroom, forever: bool = True) -> None:
    """Make the script read all sessions of this room, or stop that."""
    room._sessions_body._scripted_until = [float("inf") if forever else 0.0] * 256


def has_script(room: Stillroom, token: str) -> None:
    """Make the server know the script from now on."""
    without_plain_reads(room)
    assert room.sessions.get(token)
    without_plain_reads(room, forever=False)


def be_somebodys(client: Any, key: bytes) -> None:
    """Put another app's hash under the key."""
    client.delete(key)
    client.hset(key, "mine", "1")


# What becomes of a session, by what is called …
CALLS: dict[str, Callable[[Stillroom, Any], Any]] = {
    "as it began": lambda room, session: None,
    "rotated": lambda room, session: room.sessions.rotate(session),
    "updated": lambda room, session: room.sessions.update(session, {"more": [1]}, remove=["n"]),
    "destroyed": lambda room, session: room.sessions.destroy(session),
    "revoked with all": lambda room, session: room.sessions.destroy_all(),
}
# … and by what is done to its record.
CHANGES: dict[str, Callable[[Any, bytes], Any]] = {
    "rotated away": lambda client, key: client.hset(key, mapping={"_to": "x", "_until": 1}),
    "held": lambda client, key: client.hset(key, mapping={"_held": 1, "_x": 0}),
    "idle for too long": lambda client, key: client.hset(key, "_l", 1),
    "past its end": lambda client, key: client.hset(key, "_x", 1),
    "due": lambda client, key: client.hincrby(key, "_l", -61_000_000),
    "seen in the future": lambda client, key: client.hincrby(key, "_l", 61_000_000),
    "proved later": lambda client, key: client.hset(key, "_a", 5_000_000),
    "of a later release": lambda client, key: client.hset(key, "_news", "not JSON"),
    "without its name": lambda client, key: client.hdel(key, "_u"),
    "without its tags": lambda client, key: client.hdel(key, "_t"),
    "without its times": lambda client, key: client.hdel(key, "_l", "_i"),
    "without its stamp": lambda client, key: client.hdel(key, "_s"),
    "without what it may lack": lambda client, key: client.hdel(key, "_m", "_v", "_c", "_b"),
    "with a broken time": lambda client, key: client.hset(key, "_i", "soon"),
    "undone": lambda client, key: be_somebodys(client, key) or client.hset(key, "_never", 1),
    "a text": lambda client, key: client.set(key, "mine"),
    "a hash of somebody's": be_somebodys,
}


def make_strange(room: Stillroom, client: Any, change: str) -> str:
    """Make a session whose record has changed, and return its token."""
    data = {"n": 1, "text": 'a "_quote"', "in": {"_x": 1}}
    session = room.sessions.create("ann", data, tags=["a", "b"], meta={"m": 1})
    if change in CALLS:
        CALLS[change](room, session)
    else:
        CHANGES[change](client, record_of(room, session.handle))
    return session.token


def fields_of(text: bytes) -> dict[str, Any]:
    """Return the data of a session, whose keys are in no order."""
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("change", [*CALLS, *CHANGES])
@pytest.mark.parametrize(
    "maker", [PEPPERS, PEPPERS[::-1], PEPPERS[:1]], ids=["same", "other", "one"]
)
def test_a_plain_read_says_what_the_script_says(
    make_room: Make, client: Any, change: str, maker: list[str]
) -> None:
    """A plain read returns what the script returns, also while peppers change, with the same events and counts."""
    token = make_strange(make_room(session_peppers=maker), client, change)
    plain, scripted = (make_room(session_peppers=PEPPERS) for _ in range(2))
    without_plain_reads(scripted)
    said = []
    for room in (plain, scripted):
        events: list[Any] = []
        room.sessions.on_event.append(events.append)
        found = room.sessions.get(token, touch=False)
        about = found and (found.data, fields_of(found.text), found._about)
        counts = {name: n for name, n in room.stats.counts.items() if name.startswith("sessions")}
        said.append((about, [event.kind for event in events], counts))
    assert_alike(*said)


def assert_alike(one: Any, other: Any) -> None:
    """Check that two sessions are the same, but for the time between two reads."""
    if one[0] and other[0]:
        assert one[0][2][4] <= other[0][2][4] < one[0][2][4] + 60_000_000
        one, other = ((first[0][:2], first[0][2][:4], *first[1:]) for first in (one, other))
    assert one == other


def test_a_session_that_is_due_is_touched_and_costs_its_process_one_round_trip(
    make_room: Make, client: Any
) -> None:
    """A session due for a touch costs one round trip in a process that read it before, by the script."""
    room, other = make_room(session_touch=0.2), make_room(session_touch=0.2)
    token = room.sessions.create("ann").token
    (key,) = client.keys("*:s:*")
    for one in (room, other):
        one.state_stats.due = float("inf")
        has_script(one, token)
    assert sent(client, lambda: room.sessions.get(token)) == PLAIN
    due = room._sessions_body._touch_due
    (name,) = due
    seen = int(client.hincrby(key, "_l", -200_000))
    due[name] = 0.0
    assert sent(client, lambda: room.sessions.get(token)) == SCRIPT
    assert int(client.hget(key, "_l")) > seen
    client.hincrby(key, "_l", -300_000)
    assert sent(client, lambda: other.sessions.get(token)) == [*PLAIN, *SCRIPT]
    assert sent(client, lambda: other.sessions.get(token)) == PLAIN


@pytest.mark.usefixtures("few")
def test_where_there_are_revocations_the_script_is_asked_for_a_while(
    make_room: Make, client: Any
) -> None:
    """After a plain read found revocations the script is used for a while, in one round trip."""
    room = make_room(session_shards=1)
    room.state_stats.due = float("inf")
    token = room.sessions.create("bob").token
    has_script(room, token)
    for _ in range(3):
        room.sessions.create("ann")
    room.sessions.destroy_for_user("ann")
    assert sent(client, lambda: room.sessions.get(token)) == [*PLAIN, *SCRIPT]
    assert sent(client, lambda: room.sessions.get(token)) == SCRIPT
    room.sessions.sweep()
    room._sessions_body._scripted_until[0] = 0.0
    assert sent(client, lambda: room.sessions.get(token)) == PLAIN


def test_no_more_touches_are_remembered_than_a_bound(
    make_room: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The touches that a process remembers have a bound, whatever the number of sessions."""
    monkeypatch.setattr("stillroom.sessions.reading.TOUCHES_KNOWN", 5)
    room = make_room()
    for _ in range(20):
        assert room.sessions.get(room.sessions.create("ann"))
    assert len(room._sessions_body._touch_due) <= 5
