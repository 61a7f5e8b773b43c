"""An end of a session that was asked for before a rotation is carried out, however late it arrives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stillroom import NoDispatch, SessionEnded, Settings, Stillroom, TooManySessions
from stillroom.operation import Once, Operation
from stillroom.scripts import session_create, session_rotate
from stillroom.sessions import steady_us
from stillroom.sessions.ends import Undo
from stillroom.web.request_session import WebSession
from stillroom.web.session_cookie import SessionCookie
from tests.support.clocked import ClockedServer
from tests.support.crowd import PATIENT
from tests.support.proxy import Proxy
from tests.support.sessions import end_grace
from tests.support.stepper import Stepper

Make = Callable[..., Stillroom]
REJECT = {"max_per_user": 2, "on_cap": "reject"}
WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "destroy": lambda body, session: body.destroy(session),
    "login": lambda body, session: body.create("bob", replaces=session),
    "login of few": lambda body, session: body.create("bob", replaces=session, **REJECT),
    "login of the same user": lambda body, session: body.create("ann", replaces=session),
}


def send(room: Stillroom, *commands: Any) -> list[Any]:
    """Send these commands in one batch and return the replies."""

    def sending() -> Operation[list[Any]]:
        return (yield list(commands))

    return room.state.run(sending())


def rotated(room: Stillroom, session: Any, times: int) -> Any:
    """Return the session after that many rotations without grace."""
    for _ in range(times):
        session = room.sessions.rotate(session, grace=0)
    return session


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("times", [1, 9, 40])
def test_an_end_wins_over_rotations_that_came_after_it_was_asked_for(
    make_room: Make, way: str, times: int
) -> None:
    """A session ends though it is rotated any number of times while the command is on its way."""
    here, there = make_room(), make_room()
    for _ in range(4):  # the new session of a login falls into the same shard or into another
        session = here.sessions.create("ann")
        ending = Stepper(here, WAYS[way](here._sessions_body, session))
        fresh = rotated(there, session, times)
        ending.value()
        assert there.sessions.get(fresh) is None
        there.sessions.destroy_for_user("bob")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("times", [1, 9])
def test_a_name_whose_grace_was_over_before_ends_nothing(
    make_room: Make, way: str, times: int
) -> None:
    """A token whose grace was over before ends nobody's session."""
    here, there = make_room(), make_room()
    for _ in range(4):
        session = here.sessions.create("ann")
        fresh = rotated(there, session, times)
        Stepper(here, WAYS[way](here._sessions_body, session)).value()
        assert there.sessions.get(fresh) is not None
        there.sessions.destroy_for_user("bob")


def test_an_end_that_is_held_up_on_its_way_wins(proxy: Proxy, make_room: Make) -> None:
    """An end that left before a rotation and arrives after it learns so from its reply and is sent again."""
    settings = Settings(**{**PATIENT, "redis_url": proxy.url})
    with Stillroom(settings, dispatch=NoDispatch()) as slow:
        there = make_room()
        session = slow.sessions.create("ann")
        proxy.hold_requests()
        said: list[bool] = []
        logout = threading.Thread(target=lambda: said.append(slow.sessions.destroy(session)))
        logout.start()
        assert proxy.held.wait(10)
        fresh = rotated(there, session, 1)
        proxy.let_go()
        logout.join()
        assert said == [True]
        assert there.sessions.get(fresh) is None


def test_a_logout_into_another_session_that_is_held_up_wins(make_room: Make) -> None:
    """Where another session begins in its place, it is sent again too, and is no loss to the new token's cookie.

    The rotation comes between the making of the command and its sending, so its age is told as less than it is.
    """
    here, there = make_room(), make_room()
    for _ in range(8):
        session = here.sessions.create("ann")
        asked = steady_us()
        begin = here._sessions_body.begin(session.token, {"a": 1}, ends=True, asked_us=asked)
        held_up = Stepper(here, begin)
        fresh = there.state.run(there._sessions_body.renew(session.token, is_proof=False))
        begun = held_up.value()
        assert there.sessions.get(fresh) is None
        assert there.sessions.get(begun.token) is not None
        assert there.sessions.list_for_user("ann") == []


@pytest.mark.parametrize("brings_cookie", [True, False])
def test_a_request_whose_session_was_gone_ends_no_renewal(
    make_room: Make, brings_cookie: bool
) -> None:
    """A request with the old token that is read after a renewal, and stores something, does not end the session.

    Where the browser is getting the renewal's cookie, it begins none either.
    """
    here, there = make_room(), make_room()
    for held_up in (True, False):
        session = here.sessions.create("ann")
        asked = steady_us()
        begin = here._sessions_body.begin(session.token, {"a": 1}, asked_us=asked)
        waiting = Stepper(here, begin) if held_up else None
        if brings_cookie:
            renew = there._sessions_body.renew(session.token, is_proof=False)
            fresh = there.state.run(renew)
        else:
            fresh = there.sessions.rotate(session, grace=0)
        waiting = waiting or Stepper(here, begin)
        if brings_cookie:
            with pytest.raises(SessionEnded):
                waiting.value()
        else:
            assert there.sessions.get(waiting.value()) is not None
        assert there.sessions.get(fresh) is not None


def test_a_rotation_without_grace_keeps_what_was_to_be_kept(make_room: Make) -> None:
    """A session to keep, named before its rotation without grace, is kept under its new name, and not
    if named after.
    """
    here, there = make_room(), make_room()
    kept, other = here.sessions.create("ann"), here.sessions.create("ann")
    revoking = Stepper(here, here._sessions_body.destroy_for_user("ann", keep=kept))
    fresh = there.sessions.rotate(kept, grace=0)
    assert revoking.value() == 1
    assert there.sessions.get(fresh) is not None
    assert there.sessions.get(other) is None
    assert here.sessions.destroy_for_user("ann", keep=kept) == 1
    assert there.sessions.get(fresh) is None


@pytest.mark.parametrize("grace", [0, 60])
def test_a_handle_keeps_what_was_rotated_since_it_was_listed(make_room: Make, grace: int) -> None:
    """Of a user's sessions the one that a list showed is kept under its new name. An old token keeps none."""
    room = make_room()
    session = room.sessions.create("ann")
    (listed,) = room.sessions.list_for_user("ann")
    fresh = room.sessions.rotate(session, grace=grace)
    for _ in range(20):
        fresh = room.sessions.rotate(fresh, grace=0)
    others = [room.sessions.create("ann") for _ in range(150)]
    assert room.sessions.destroy_for_user("ann", keep=listed.handle) == len(others)
    assert room.sessions.get(fresh) is not None
    assert room.sessions.count("ann") == 1
    assert room.sessions.destroy_for_user("ann", keep=session) == 1
    assert room.sessions.count("ann") == 0


def test_a_handle_ends_what_was_rotated_a_thousand_times_since(make_room: Make) -> None:
    """A handle, or the alarm of a replay, ends a session that was rotated a thousand times since."""
    here, there = make_room(), make_room()
    session = here.sessions.create("ann")
    (device,) = here.sessions.list_for_user("ann")
    fresh = rotated(there, session, 999)
    events: list[Any] = []
    here.sessions.on_event.append(events.append)
    assert here.sessions.get(session) is None
    assert [event.kind for event in events] == ["replayed"]
    assert here.sessions.end("bob", device.handle) is False
    assert here.sessions.end("ann", events[0].handle) is True
    assert there.sessions.get(fresh) is None
    assert here.sessions.end("ann", device.handle) is False


def test_a_replay_is_told_as_long_as_the_session_may_live(make_room: Make, client: Any) -> None:
    """A replay is recognized until the absolute end of the session, not for one idle time only."""
    room = make_room()
    session = room.sessions.create("ann", idle=10, absolute=3_600)
    fresh = room.sessions.rotate(session, grace=0)
    end_grace(client, room, session.handle)
    (key,) = [key for key in client.keys("*:s:*") if client.hexists(key, "_to")]
    assert 3_590 < client.ttl(key) <= 3_670
    assert room.sessions.get(fresh) is not None


# Deferred, and a server whose clock is not what it was


@pytest.fixture
def clocked() -> Iterator[ClockedServer]:
    with ClockedServer() as server:
        yield server


@pytest.mark.parametrize("before", [3_600, 0, -3_600])
@pytest.mark.parametrize("after", [3_600, 0, -3_600])
def test_a_deferred_end_carries_its_age_not_a_time(
    clocked: ClockedServer, before: int, after: int
) -> None:
    """A deferred end carries its age, so that a clock step of an hour does not change what came first."""
    settings = Settings(**{**PATIENT, "redis_url": clocked.url})
    here, there = (Stillroom(settings, dispatch=NoDispatch()) for _ in range(2))
    with here, there:
        clocked.set_clock(before)
        lost, safe = here.sessions.create("ann", idle=9e4), here.sessions.create("bob", idle=9e4)
        renewed = there.sessions.rotate(safe, grace=0)
        body = here._sessions_body
        time.sleep(0.01)  # the rotation was so long ago when the logout was asked for
        for session in (lost, safe):
            place = body._place(session)
            assert place is not None
            assert body._defer(place, body._destroying(place))
        clocked.set_clock(after)
        fresh = rotated(there, lost, 2)
        assert here.sessions.deliver() == 0
        assert there.sessions.get(fresh) is None
        if before == after:  # else nobody can tell how long that grace had been over
            assert there.sessions.get(renewed) is not None


def test_a_clock_that_steps_back_opens_no_old_token(clocked: ClockedServer) -> None:
    """The grace of an old token, and a proof of who the user is, last no longer because the clock steps back."""
    settings = Settings(**{**PATIENT, "redis_url": clocked.url})
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        clocked.set_clock(0)
        at_once, later = room.sessions.create("ann"), room.sessions.create("ann")
        room.sessions.rotate(at_once, grace=0)
        fresh = room.sessions.rotate(later, grace=10)
        assert room.sessions.get(later) is not None
        clocked.set_clock(-5)
        assert room.sessions.get(later) is not None
        clocked.set_clock(-3_600)
        told: list[str] = []
        room.sessions.on_event.append(lambda event: told.append(event.kind))
        for old in (at_once, later):
            assert room.sessions.get(old) is None
            assert room.sessions.touch(old) is False
            with pytest.raises(SessionEnded, match="replayed"):
                room.sessions.update(old, {"a": 1})
        assert set(told) == {"replayed"}
        for touch in (True, False):
            found = room.sessions.get(fresh, touch=touch)
            assert found is not None
            assert not found.is_fresh(300)
        assert room.sessions.confirm(fresh).is_fresh(300)
        assert room.sessions.destroy(later)  # it leads to the session, which is to end


# What is sent twice, or late


@pytest.mark.parametrize("when", ["made", "undone"])
def test_a_creation_that_arrives_again_recognises_itself(make_room: Make, when: str) -> None:
    """A create that arrives twice makes one session, and none if it was undone because its reply was lost."""
    room = make_room()
    room.sessions.create("eve")
    operation = room._sessions_body.create("ann", {"a": 1})
    batch = operation.send(None)
    assert type(batch) is Once  # the wire sends no second copy, which might come after a logout
    (command,) = batch
    assert command[1] == session_create.text.sha
    if when == "undone":
        assert send(room, Undo((command[3],), command[4]).command(0)) == [0]
        assert send(room, command) == [[b"never"]]
        assert room.sessions.count("ann") == 0
        return
    with pytest.raises(StopIteration) as made:
        operation.send(send(room, command))
    send(room, command)
    assert room.sessions.count("ann") == 1
    assert room.sessions.get(made.value.value) is not None


def test_a_creation_that_arrives_again_says_again_what_is_in_doubt(make_room: Make) -> None:
    """A create that arrives twice tells both times that what it replaces was rotated a moment before."""
    room = make_room()
    room.sessions.create("eve")
    guest = room.sessions.create(None)
    (command,) = room._sessions_body.create(None, {"a": 1}, replaces=guest).send(None)
    assert command[1] == session_create.text.sha
    room.sessions.rotate(guest, grace=0)
    first, second = send(room, command, command)
    assert 0 <= int(first[4]) <= int(second[4])


def test_a_rotation_that_arrives_after_it_was_undone_does_nothing(make_room: Make) -> None:
    """A rotation that arrives after it was undone does nothing, so that the old token stays good."""
    room = make_room()
    session = room.sessions.create("ann", {"a": 1}, tags=["t"])
    room.sessions.rotate(room.sessions.create("eve"))
    for order in ("late", "lost"):
        (command,) = room._sessions_body.rotate(session, grace=0).send(None)
        assert command[1] == session_rotate.text.sha
        old, new, prefix = command[3], command[4], command[5]
        undo = Undo((new, old), prefix).command(0)
        if order == "late":
            assert send(room, undo) == [0]
            assert send(room, command) == [[b"conflict"]]
        else:
            assert send(room, command)[0][0] == b"ok"
            assert send(room, undo) == [1]
        found = room.sessions.get(session)
        assert found is not None
        assert found.data == {"a": 1}
        assert [one.handle for one in room.sessions.list_for_user("ann")] == [session.handle]
    assert room.sessions.destroy_by_tag("t") == 1


def test_a_handle_of_a_rotation_that_was_undone_ends_the_session(make_room: Make) -> None:
    """A list that was shown before a rotation was undone names the session all the same."""
    room = make_room()
    room.sessions.rotate(room.sessions.create("eve"))
    for grace in (0, 60):
        session = room.sessions.create("ann", {"a": 1})
        (command,) = room._sessions_body.rotate(session, grace=grace).send(None)
        old, new, prefix = command[3], command[4], command[5]
        assert send(room, command)[0][0] == b"ok"
        (listed,) = room.sessions.list_for_user("ann")
        undo = Undo((new, old), prefix).command(0)
        assert send(room, undo, undo) == [1, 0]
        assert room.sessions.get(session) is not None
        later = room.sessions.rotate(session)
        assert room.sessions.end("ann", listed.handle)
        assert room.sessions.get(later) is None
        assert room.sessions.count("ann") == 0


@pytest.mark.parametrize("on_cap", ["evict_oldest", "reject"])
def test_a_login_that_is_killed_between_any_two_steps_leaves_one_session(
    make_room: Make, on_cap: str
) -> None:
    """A login killed between any two steps leaves one session and never two, in one shard and across two."""
    room = make_room()
    for stop in range(6):
        for _ in range(4):
            guest = room.sessions.create(None)
            options = {"max_per_user": 3, "on_cap": on_cap}
            login = Stepper(room, room._sessions_body.create("ann", replaces=guest, **options))
            for _ in range(stop):
                if not login.done:
                    login.step()
            both = room.sessions.get(guest) is not None and room.sessions.count("ann") > 0
            assert not both
            room.sessions.destroy_for_user("ann")


def test_a_refused_login_gives_the_visitor_back(make_room: Make) -> None:
    """A refused login leaves the session before it as it was, with its indexes."""
    room = make_room()
    for _ in range(2):
        room.sessions.create("ann")
    for _ in range(4):
        guest = room.sessions.create("visitor", {"cart": [1]}, tags=["t"])
        before = guest.expires_at
        with pytest.raises(TooManySessions):
            room.sessions.create("ann", replaces=guest, **REJECT)
        found = room.sessions.get(guest, touch=False)
        assert found is not None
        assert (found.data, found.expires_at) == ({"cart": [1]}, before)
        assert room.sessions.destroy_by_tag("t") == 1


@pytest.mark.parametrize(("most", "left"), [(2, 2), (1, 1)])
def test_a_session_that_may_go_on_counts_for_the_cap_of_its_user(
    make_room: Make, most: int, left: int
) -> None:
    """While it is open whether Bob's login takes the place of Ann's session, another login of Ann counts it."""
    room = make_room()
    for _ in range(REJECT["max_per_user"]):
        bob = room.sessions.create("bob")
    users = (f"ann-{n}" for n in range(100))
    anns = (room.sessions.create(user) for user in users)
    ann = next(one for one in anns if one.handle[:2] != bob.handle[:2])
    assert ann.user_id is not None
    login = Stepper(room, room._sessions_body.create("bob", replaces=ann, **REJECT))
    while room.sessions.get(ann) is not None:
        login.step()
    room.sessions.create(ann.user_id, max_per_user=most)
    with pytest.raises(TooManySessions):
        login.value()
    assert room.sessions.count(ann.user_id) == left


OVERTAKING: dict[str, Callable[[Any, Any], Any]] = {
    "destroy": lambda sessions, ann: sessions.destroy(ann),
    "end": lambda sessions, ann: sessions.end(ann.user_id, ann.handle),
    "all of hers": lambda sessions, ann: sessions.destroy_for_user(ann.user_id),
    "by tag": lambda sessions, ann: sessions.destroy_by_tag("t"),
    "everybody": lambda sessions, ann: sessions.destroy_all(),
    "anonymous": lambda sessions, ann: sessions.create(None, replaces=ann),
    "her login": lambda sessions, ann: sessions.create(ann.user_id, replaces=ann),
    "her only login": lambda sessions, ann: sessions.create(
        ann.user_id, replaces=ann, max_per_user=1, on_cap="reject"
    ),
    "another's login": lambda sessions, ann: sessions.create("eve", replaces=ann),
}


@pytest.mark.parametrize("way", OVERTAKING)
def test_a_session_that_ended_meanwhile_is_not_given_back(make_room: Make, way: str) -> None:
    """While it is open whether Bob's login takes Ann's place, her session ends, and stays so if he is refused."""
    room = make_room()
    for _ in range(REJECT["max_per_user"]):
        bob = room.sessions.create("bob")
    users = (f"ann-{n}" for n in range(100))
    anns = (room.sessions.create(user, tags=["t"]) for user in users)
    ann = next(one for one in anns if one.handle[:2] != bob.handle[:2])
    login = Stepper(room, room._sessions_body.create("bob", replaces=ann, **REJECT))
    while room.sessions.get(ann) is not None:
        login.step()
    OVERTAKING[way](room.sessions, ann)
    if way != "everybody":  # then there is room for Bob
        with pytest.raises(TooManySessions):
            login.value()
    assert room.sessions.get(ann) is None
    assert [one.handle for one in room.sessions.list_for_user(ann.user_id)].count(ann.handle) == 0


def test_a_logout_of_what_is_empty_leaves_the_data_of_a_visitor_whose_login_is_refused(
    make_room: Make,
) -> None:
    """A session with data that a login holds is not ended by a response that ends it only if it is empty."""
    room = make_room()
    for _ in range(REJECT["max_per_user"]):
        bob = room.sessions.create("bob")
    guests = (room.sessions.create(None, {"cart": [1]}) for _ in range(100))
    guest = next(one for one in guests if one.handle[:2] != bob.handle[:2])
    login = Stepper(room, room._sessions_body.create("bob", replaces=guest, **REJECT))
    while room.sessions.get(guest) is not None:
        login.step()
    assert not room.state.run(room._sessions_body.log_out(guest.token, if_empty=True))
    with pytest.raises(TooManySessions):
        login.value()
    assert room.sessions.get(guest) is not None


def test_a_login_that_may_be_refused_takes_no_cookie_from_the_visitor(make_room: Make) -> None:
    """Requests that look while it is open whether the login is refused leave the visitor's cookie alone."""
    here, there = make_room(), make_room()
    body = there._sessions_body

    def request(token: str) -> WebSession:
        scope = {"wsgi.url_scheme": "https"}
        return WebSession(body, there.state, SessionCookie(), token, scope)

    for _ in range(REJECT["max_per_user"]):
        ann = here.sessions.create("ann")
    guests = (here.sessions.create(None, {"cart": [1]}) for _ in range(100))
    guest = next(one for one in guests if one.handle[:2] != ann.handle[:2])
    login = Stepper(here, here._sessions_body.log_in(guest.token, "ann", {}, **REJECT))
    while there.sessions.get(guest) is not None:
        login.step()
    looks, begins = request(guest.token), request(guest.token)
    assert "cart" not in looks
    begins["theme"] = "dark"
    assert there.state.run(looks.writing()) is None
    with pytest.raises(SessionEnded):
        begins.save()
    with pytest.raises(TooManySessions):
        login.value()
    assert request(guest.token)["cart"] == [1]
    assert not there.state.run(body.is_late(guest.token))
