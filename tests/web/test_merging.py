"""Two requests that change one list, dict or counter at once both keep their changes, with each face."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import permutations
from typing import Any

import flask
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom import Stillroom
from stillroom.web.flask import StillroomSessions
from stillroom.web.merge import GONE, merged, merged_keys
from stillroom.web.request_session import RequestSession, WebSession
from stillroom.web.session_cookie import SessionCookie
from tests.support.stepper import Stepper
from tests.support.web import WITHIN, Browser, serving_wsgi
from tests.web.test_late_responses import COOKIE, Face, own

__all__ = ["own"]

Act = Callable[[RequestSession], object]


def at_once(face: Face, token: str, *acts: Act) -> list[int]:
    """Let all requests read and change the session before the first one writes; return the statuses."""
    from stillroom.web.ending import ending

    sessions = [face.session(token) for _ in acts]
    for session, act in zip(sessions, acts, strict=True):
        face.run(session.reading())
        act(session)
    ends = [face.run(ending(session, 200, [], "GET")) for session in sessions]
    return [end.instead.status if end.instead else 200 for end in ends]


def append(key: str, item: object) -> Act:
    return lambda session: session.setdefault(key, []).append(item)


def assign(key: str, item: object) -> Act:
    return lambda session: session.__setitem__(key, [*session.get(key, []), item])


def add_one(session: RequestSession) -> None:
    session.mutate(lambda data: data.update(n=data["n"] + 1))


STORIES: list[tuple[str, dict[str, Any], list[Act], dict[str, Any]]] = [
    ("both append", {"l": ["a"]}, [append("l", "b"), append("l", "c")], {"l": ["a", "b", "c"]}),
    ("both begin one", {}, [append("l", "b"), append("l", "c")], {"l": ["b", "c"]}),
    (
        "appended by assignment",
        {"l": ["a"]},
        [assign("l", "b"), assign("l", "c")],
        {"l": ["a", "b", "c"]},
    ),
    ("three", {"l": []}, [append("l", n) for n in range(3)], {"l": [0, 1, 2]}),
    (
        "one removes, one appends",
        {"l": ["a", "b"]},
        [lambda s: s["l"].remove("a"), append("l", "c")],
        {"l": ["b", "c"]},
    ),
    (
        "one takes it away, one appends",
        {"l": ["a"]},
        [lambda s: s.pop("l"), append("l", "b")],
        {"l": ["b"]},
    ),
    (
        "one appends, one takes it away",
        {"l": ["a"]},
        [append("l", "b"), lambda s: s.pop("l")],
        {"l": ["b"]},
    ),
    (
        "both take it away",
        {"l": ["a"], "k": 1},
        [lambda s: s.pop("l"), lambda s: s.pop("l")],
        {"k": 1},
    ),
    (
        "different keys of a dict",
        {"d": {"a": 1}},
        [lambda s: s["d"].update(b=2), lambda s: s["d"].update(c=3)],
        {"d": {"a": 1, "b": 2, "c": 3}},
    ),
    (
        "deep in a dict",
        {"d": {"a": {"l": [1]}}},
        [lambda s: s["d"]["a"]["l"].append(2), lambda s: s["d"]["a"]["l"].append(3)],
        {"d": {"a": {"l": [1, 2, 3]}}},
    ),
    ("a set", {"s": {1}}, [lambda s: s["s"].add(2), lambda s: s["s"].discard(1)], {"s": {2}}),
    (
        "a number: the last wins",
        {"n": 1},
        [lambda s: s.update(n=2), lambda s: s.update(n=3)],
        {"n": 3},
    ),
    (
        "another order: the last wins",
        {"l": [1, 2]},
        [lambda s: s["l"].reverse(), append("l", 3)],
        {"l": [2, 1, 3]},
    ),
    (
        "unseen: the last wins",
        {"l": [1]},
        [append("l", 2), lambda s: s.__setitem__("l", ["new"])],
        {"l": ["new"]},
    ),
    (
        "other keys too",
        {"l": ["a"], "x": 1},
        [
            lambda s: (append("l", "b")(s), s.update(x=2)),
            lambda s: (append("l", "c")(s), s.update(y=3)),
        ],
        {"l": ["a", "b", "c"], "x": 2, "y": 3},
    ),
    (
        "counters by mutate",
        {"n": 1},
        [add_one] * 3,
        {"n": 4},
    ),
    (
        "mutate with another dict",
        {"n": 1, "gone": 1},
        [lambda s: s.mutate(lambda data: {"n": data["n"] + 1})] * 2,
        {"n": 3},
    ),
    (
        "changes before and after a mutate",
        {"n": 1, "l": ["a"]},
        [
            lambda s: (
                append("l", "b")(s),
                s.update(n=10),
                s.mutate(lambda data: data.update(n=data["n"] + 1)),
                append("l", "c")(s),
            ),
            append("l", "d"),
        ],
        {"n": 11, "l": ["a", "b", "c", "d"]},
    ),
    (
        "a key that is taken away before a mutate",
        {"n": 1, "l": ["a"]},
        [add_one, lambda s: (s.pop("l"), add_one(s))],
        {"n": 3},
    ),
    (
        "a list from before a mutate",
        {"n": 1, "l": ["a"]},
        [add_one, lambda s: [s["l"].append("b"), old := s["l"], add_one(s), old.append("c")]],
        {"n": 3, "l": ["a", "b"]},
    ),
]


@pytest.mark.parametrize(
    ("name", "before", "acts", "after"), STORIES, ids=[story[0] for story in STORIES]
)
def test_both_keep_what_they_did(
    own: Face,
    room: Stillroom,
    name: str,
    before: dict[str, Any],
    acts: list[Act],
    after: dict[str, Any],
) -> None:
    """Changes that can be added to another request's are kept; of others the last one wins."""
    token = room.sessions.create(None, before or {"x": 0}).token
    assert at_once(own, token, *acts) == [200] * len(acts)
    found = room.sessions.get(token)
    assert found is not None
    data = {key: value for key, value in found.data.items() if before or key != "x"}
    assert data == after or ("order" in name and sorted(data["l"]) == sorted(after["l"]))


@pytest.mark.parametrize(
    ("before", "acts", "after"),
    [
        (None, [], {"l": ["a", "b"], "n": 1}),
        (None, [append("l", "c")], {"l": ["a", "b", "c"], "n": 1}),
        ("ann", [], {"l": ["a", "b"], "n": 1}),
        ("bob", [], {}),
        (None, [lambda s: s.clear(), lambda s: s.login("ann")], {}),
    ],
    ids=["login", "login and more", "the same user", "another user", "begun anew"],
)
def test_a_login_takes_along_what_another_request_has_just_added(
    own: Face, room: Stillroom, before: str | None, acts: list[Act], after: dict[str, Any]
) -> None:
    """What another request adds while a login looks at the password goes along, but for CSRF tokens."""
    from stillroom.web.ending import ending

    token = room.sessions.create(before, {"l": ["a"]}).token
    session = own.session(token)
    own.run(session.reading())
    session.login("ann")
    for act in acts:
        act(session)
    room.sessions.update(token, {"l": ["a", "b"], "n": 1, "csrf_token": "t"})
    end = own.run(ending(session, 200, [], "POST"))
    cookie = SessionCookie(COOKIE.name).read(dict(end.headers)["Set-Cookie"])
    found = room.sessions.get(cookie or "")
    assert found is not None
    assert (found.user_id, found.data) == ("ann", after)


def answer(task: Stepper) -> None:
    """Have Redis answer what a task asks, and the task not know it yet."""
    for _ in task.at:
        task.step()


def test_tasks_of_one_request_change_what_the_first_has_read(room: Stillroom) -> None:
    """Where another request writes between the reads of two tasks, what they do is merged with what it wrote."""
    token = room.sessions.create(None, {"l": ["a"]}).token
    session = WebSession(room._sessions_body, room.state, SessionCookie(), token, {})
    first, second = (Stepper(room, session.reading()) for _ in range(2))
    answer(first)
    room.sessions.update(token, {"l": ["a", "b"]})
    answer(second)
    first.run()
    second.run()
    session["l"].append("c")
    session.save()
    found = room.sessions.get(token)
    assert found is not None
    assert found.data == {"l": ["a", "b", "c"]}


def test_nobody_is_lost_in_any_order(own: Face, room: Stillroom) -> None:
    """Four requests, two of which append, keep all changes in every order of writing."""
    acts = [append("l", 1), append("l", 2), lambda s: s.update(a=1), lambda s: s["d"].update(b=2)]
    for order in permutations(acts):
        token = room.sessions.create(None, {"l": [0], "d": {}}).token
        at_once(own, token, *order)
        found = room.sessions.get(token)
        assert found is not None
        assert sorted(found.data["l"]) == [0, 1, 2]
        assert (found.data["a"], found.data["d"]) == (1, {"b": 2})


def test_a_merge_never_brings_a_session_back(own: Face, room: Stillroom) -> None:
    """A merge after a concurrent logout is a 409 and brings nothing back."""
    token = room.sessions.create("ann", {"l": [0]}).token
    statuses = at_once(own, token, append("l", 1), RequestSession.logout, append("l", 2))
    assert statuses == [200, 200, 409]
    assert room.sessions.count() == 0


def test_a_change_that_fails_changes_nothing(own: Face, room: Stillroom) -> None:
    """`mutate` raises the function's error and leaves the session as it was."""
    token = room.sessions.create(None, {"l": [0]}).token

    def fails(data: dict[str, Any]) -> None:
        data["l"].append(1)
        raise ValueError("no")

    def act(session: RequestSession) -> None:
        with pytest.raises(ValueError, match="no"):
            session.mutate(fails)
        session["after"] = True

    at_once(own, token, act)
    found = room.sessions.get(token)
    assert found is not None
    assert found.data == {"l": [0], "after": True}


def test_mutate_in_a_session_that_begins(own: Face, room: Stillroom) -> None:
    """`mutate` works in a session that begins, without another request to merge with."""
    session = own.session(None)
    own.run(session.reading())
    session.mutate(lambda data: data.update(n=data.get("n", 0) + 1))
    session.mutate(lambda data: data.update(n=data.get("n", 0) + 1))
    own.run(session.writing())
    assert room.sessions.count() == 1
    assert session["n"] == 2


def test_two_tabs_append_to_one_list(room: Stillroom) -> None:
    """Two tabs append to one list through real requests of Flask that both read before either writes."""
    app = flask.Flask("shop")
    app.session_interface = StillroomSessions(room)
    meet = threading.Barrier(2)

    @app.get("/add/<item>")
    def add(item: str) -> str:
        cart = flask.session.setdefault("cart", [])
        if item != "tea":
            meet.wait(WITHIN)
        cart.append(item)
        return item

    with serving_wsgi(app) as port:
        browser = Browser(port)
        browser.get("/add/tea")
        tabs = [
            threading.Thread(target=Browser(port, browser.token).get, args=(f"/add/{item}",))
            for item in ("jam", "rye")
        ]
        for tab in tabs:
            tab.start()
        for tab in tabs:
            tab.join()
    found = room.sessions.get(browser.token or "")
    assert found is not None
    assert sorted(found.data["cart"]) == ["jam", "rye", "tea"]


# The merge itself

SMALL = st.lists(st.integers(0, 3), max_size=5)


@given(SMALL, SMALL, SMALL)
def test_what_is_appended_by_both_is_there_once(
    base: list[int], ours: list[int], theirs: list[int]
) -> None:
    """A list that both requests appended to has the other's items first, then ours, each once."""
    assert merged(base, base + ours, base + theirs) == base + theirs + ours


@given(SMALL, SMALL)
def test_alone_a_request_does_what_it_did(base: list[int], ours: list[int]) -> None:
    """A request whose key nobody else changed stores its own value."""
    assert merged(base, ours, base) == ours
    assert merged(base, GONE, base) is GONE


VALUES = st.recursive(
    st.integers(0, 2), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from("ab"), v)
)


@given(VALUES, VALUES, VALUES)
def test_a_merge_never_fails(base: Any, ours: Any, theirs: Any) -> None:
    """A merge never raises, whatever the types of the values have become."""
    merged(base, ours, theirs)
    assert merged(base, base, theirs) in (theirs, base)
    for value in (ours, theirs):
        assert merged_keys({"k": base}, {"k": value}, {"k": base}) in ({"k": value}, {})
