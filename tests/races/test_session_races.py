"""Sessions of two processes hold under races that begin at the same moment, again and again."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from stillroom import SessionConflict, SessionEnded, Stillroom, TooManySessions
from tests.support.bounded import assert_bounded
from tests.support.sessions import age, record_of, sessions_keys
from tests.support.threads import at_once, repeated

Act = Callable[[], Any]


def together(*acts: Act) -> list[Any]:
    """Begin all acts at the same moment; return each result or error."""

    def outcome(number: int) -> Any:
        try:
            return acts[number]()
        except (SessionEnded, SessionConflict, TooManySessions) as error:
            return error

    return at_once(len(acts), outcome)


def assert_no_trace(client: Any) -> None:
    """Check that no record and no index line is left; a tombstone may be, and is cleared away."""
    for key in sessions_keys(client):
        assert client.type(key) == b"hash", (key, client.zrange(key, 0, -1))
        assert client.hexists(key, "_to"), (key, client.hgetall(key))
        client.delete(key)


@pytest.mark.long
def test_a_session_that_was_destroyed_stays_so(
    make_room: Callable[..., Stillroom], client: Any, is_full: bool
) -> None:
    """A destroyed session never comes back, whole or in part, against a thousand concurrent operations."""
    rooms = [make_room(session_touch=0.001) for _ in range(6)]
    one, two, three, four, five, six = [room.sessions for room in rooms]
    turns = 1_000 if is_full else 200
    ended = 0
    barrier = threading.Barrier(6)
    made: list[Any] = [None]
    fresh: list[Any] = [None]

    def prepare() -> None:
        made[0] = one.create("u1", {"a": 1}, tags=["t"], idle=60)
        age(client, rooms[0], made[0].handle, 10)  # a touch has something to write

    def check() -> None:
        nonlocal ended
        ended += 1
        assert one.get(made[0]) is None
        assert fresh[0] is None or one.get(fresh[0]) is None
        fresh[0] = None
        assert_no_trace(client)

    def act(work: Callable[[], Any]) -> None:
        for _ in range(turns):
            barrier.wait(60)
            with contextlib.suppress(SessionEnded, SessionConflict):
                work()
            barrier.wait(60)

    def rotate() -> None:
        fresh[0] = three.rotate(made[0], grace=60)

    def lead() -> None:
        try:
            for _ in range(turns):
                prepare()
                barrier.wait(60)
                one.destroy(made[0])
                barrier.wait(60)
                check()
        except BaseException:
            barrier.abort()  # nobody waits for who has failed
            raise

    works: Sequence[Callable[[], Any]] = [
        lambda: two.update(made[0], {"b": random.random()}),
        rotate,
        lambda: four.touch(made[0]),
        lambda: five.get(made[0]),
        six.sweep,
    ]
    with ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(lead), *[threads.submit(act, work) for work in works]]
        for future in futures:
            future.result()
    assert ended == turns
    assert_bounded(client)


def test_of_fifty_rotations_one_wins(make_room: Callable[..., Stillroom]) -> None:
    """Of fifty rotations one wins, the others raise, and the session is in one place under one new token."""
    rooms = [make_room() for _ in range(5)]
    session = rooms[0].sessions.create("u1", {"a": 1}, tags=["t"])
    results = together(*[lambda n=n: rooms[n % 5].sessions.rotate(session) for n in range(50)])
    won = [result for result in results if not isinstance(result, Exception)]
    assert len(won) == 1
    assert all(isinstance(r, SessionConflict) for r in results if r is not won[0])
    assert rooms[0].sessions.get(won[0]).data == {"a": 1}
    assert [device.handle for device in rooms[0].sessions.list_for_user("u1")] == [won[0].handle]


def test_a_rotation_loses_no_update(make_room: Callable[..., Stillroom]) -> None:
    """An update under the old token during a rotation is stored or refused, and never lost silently."""
    one, two = make_room().sessions, make_room().sessions
    for n in range(100):
        session = one.create("u1", {"n": -1})
        fresh, version = together(
            partial(one.rotate, session), partial(two.update, session, {"n": n})
        )
        assert not isinstance(fresh, Exception)
        assert version == 2
        assert one.get(fresh).data == {"n": n}


def test_updates_of_different_keys_are_all_kept(make_room: Callable[..., Stillroom]) -> None:
    """Eight threads with fifty updates on their own keys lose none, and each update counts a version."""
    rooms = [make_room() for _ in range(8)]
    session = rooms[0].sessions.create("u1")

    def work(n: int) -> None:
        for value in range(50):
            rooms[n].sessions.update(session, {f"k{n}": value})

    together(*[lambda n=n: work(n) for n in range(8)])
    read = rooms[0].sessions.get(session)
    assert read is not None
    assert read.data == {f"k{n}": 49 for n in range(8)}
    assert read.version == 401


def test_a_counter_by_compare_and_set_is_exact(make_room: Callable[..., Stillroom]) -> None:
    """Eight threads count to fifty each by compare-and-set, and the sum is exact."""
    rooms = [make_room() for _ in range(8)]
    session = rooms[0].sessions.create("u1", {"n": 0})

    def add(data: dict[str, Any]) -> dict[str, Any]:
        return {"n": data["n"] + 1}

    def work(n: int) -> None:
        for _ in range(50):
            rooms[n].sessions.mutate(session, add)

    assert together(*[lambda n=n: work(n) for n in range(8)]) == [None] * 8
    read = rooms[0].sessions.get(session)
    assert read is not None
    assert read.data == {"n": 400}


@pytest.mark.parametrize("on_cap", ["evict_oldest", "reject"])
def test_parallel_logins_never_pass_the_cap(
    make_room: Callable[..., Stillroom], on_cap: str
) -> None:
    """Fifty parallel logins under a cap of three leave three sessions, and never show more."""
    rooms = [make_room() for _ in range(5)]
    counts: list[int] = []
    with repeated(lambda: counts.append(rooms[0].sessions.count("u1"))):
        results = together(
            *[
                lambda n=n: rooms[n % 5].sessions.create("u1", max_per_user=3, on_cap=on_cap)
                for n in range(50)
            ]
        )
    assert max(counts) <= 3
    assert rooms[0].sessions.count("u1") == 3
    refused = [result for result in results if isinstance(result, TooManySessions)]
    assert len(refused) == (47 if on_cap == "reject" else 0)


def test_a_revocation_against_logins(make_room: Callable[..., Stillroom], is_full: bool) -> None:
    """A session created before a revocation is dead and one created after it lives, by each shard's order."""
    one, two, three = (make_room().sessions for _ in range(3))
    for turn in range(30 if is_full else 8):
        user = f"u{turn}"
        before = [one.create(user, tags=["t"]) for _ in range(250)]
        first, ended, second = together(
            lambda user=user: two.create(user, tags=["t"]),
            lambda user=user: one.destroy_for_user(user),
            lambda user=user: three.create(user, tags=["t"]),
        )
        lived = sum(one.get(session) is not None for session in (first, second))
        assert ended + lived == 252
        assert not any(one.get(session) for session in before)
        after = one.create(user, tags=["t"])
        one.sweep()
        assert one.get(after) is not None
        assert one.count(user) == lived + 1


def test_a_revocation_against_a_rotation(make_room: Callable[..., Stillroom]) -> None:
    """A session rotated during a revocation is dead under both tokens."""
    one, two = make_room().sessions, make_room().sessions
    for by in ("user", "tag") * 25:
        session = one.create("u1", tags=["t"])
        end = (
            (lambda: one.destroy_for_user("u1"))
            if by == "user"
            else (lambda: one.destroy_by_tag("t"))
        )
        fresh, _ = together(lambda session=session: two.rotate(session), end)
        assert one.get(session) is None
        assert isinstance(fresh, SessionEnded) or one.get(fresh) is None


def test_a_sweep_against_touches(
    make_room: Callable[..., Stillroom], client: Any, is_full: bool
) -> None:
    """A session touched in time lives whole while two workers sweep."""
    rooms = [make_room() for _ in range(4)]
    sessions = rooms[0].sessions
    for _ in range(10 if is_full else 4):
        made = [sessions.create("u1", {"a": 1}, tags=["t"]) for _ in range(60)]
        for session in made:
            age(client, rooms[0], session.handle, 86_390)
            shard = int(session.handle[:2], 16)
            for member in client.zrange(rooms[0].keys.due_sessions(shard), 0, -1):
                client.zadd(rooms[0].keys.due_sessions(shard), {member: 1})
        reports = together(
            rooms[1].sessions.sweep,
            rooms[2].sessions.sweep,
            lambda made=made: [rooms[3].sessions.touch(session) for session in made],
        )
        assert reports[2] == [True] * 60
        assert reports[0]["expired"] == reports[1]["expired"] == 0
        assert all(client.hget(record_of(rooms[0], s.handle), "a") == b"1" for s in made)
        assert sessions.count("u1") == sessions.destroy_for_user("u1") == 60


def test_two_workers_share_a_sweep(make_room: Callable[..., Stillroom], client: Any) -> None:
    """Two workers that sweep delete and report each expired session once."""
    rooms = [make_room() for _ in range(2)]
    told: list[str] = []
    for room in rooms:
        room.sessions.on_event.append(lambda event: told.append(event.handle))
    made = [rooms[0].sessions.create(f"u{n}", idle=10) for n in range(200)]
    for session in made:
        age(client, rooms[0], session.handle, 11)
    reports = together(*[lambda room=room: room.sessions.sweep(limit=5) for room in rooms])
    assert sum(report["expired"] for report in reports) == 200
    assert sorted(told) == sorted(session.handle for session in made)
    assert sessions_keys(client) == []
