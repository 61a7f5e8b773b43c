"""Two requests of one browser keep, in every order, what a login, a new token or a logout did to the cookie."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from stillroom import AsyncStillroom, NoDispatch, SessionEnded, Settings, Stillroom
from stillroom.leash import until
from stillroom.operation import Operation
from stillroom.web.ending import ending
from stillroom.web.request_session import AsyncWebSession, RequestSession, WebSession
from stillroom.web.session_cookie import SessionCookie
from tests.support.faces import FACES

COOKIE = SessionCookie()
ORDERS = ["aabb", "abab", "abba", "baab", "baba", "bbaa"]  # each looks, then answers


def add(session: RequestSession) -> None:
    session.setdefault("cart", []).append("tea")


def append(session: RequestSession) -> None:
    session["theme"] = "dark"


ACTS: dict[str, Callable[[RequestSession], object]] = {
    "look": lambda session: session.get("cart"),
    "set": append,
    "add": add,
    "login": lambda session: session.login("ann"),
    "renew": RequestSession.renew,
    "logout": RequestSession.logout,
    "clear": RequestSession.clear,
}
DECIDES = ("login", "renew", "logout", "clear")


class Face:
    """One of the two faces, run by hand."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._loop = asyncio.new_event_loop() if name == "async" else None
        self.room: Any = (AsyncStillroom if self._loop else Stillroom)(
            settings, dispatch=NoDispatch()
        )

    def session(self, token: str | None) -> RequestSession:
        kind: Any = AsyncWebSession if self._loop else WebSession
        request = {"headers": [], "wsgi.url_scheme": "https", "scheme": "https"}
        body, driver = self.room._sessions_body, self.room.state
        session: RequestSession = kind(body, driver, COOKIE, token, request)
        return session

    def run(self, operation: Operation[Any]) -> Any:
        result = self.room.state.run(operation)
        return self._loop.run_until_complete(result) if self._loop else result

    def close(self) -> None:
        closing = self.room.close()
        if self._loop:
            self._loop.run_until_complete(closing)
            self._loop.close()


@pytest.fixture(params=FACES)
def own(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Face]:
    face = Face(request.param, settings)
    yield face
    face.close()


class Asked:
    """One request that reads the session and then answers."""

    def __init__(self, face: Face, act: str, token: str | None) -> None:
        self._face = face
        self._act = ACTS[act]
        self._has_looked = False
        self.session = face.session(token)
        self.set_cookie: str | None = None
        self.status = 200

    def step(self) -> bool:
        """Take the next step; return whether it was the answer."""
        if not self._has_looked:
            self._has_looked = True
            self._face.run(self.session.reading())
            self._act(self.session)
            return False
        end = self._face.run(ending(self.session, 200, [], "GET"))
        self.status = end.instead.status if end.instead else 200
        self.set_cookie = dict(end.headers).get("Set-Cookie")
        return True


def browsed(
    face: Face, token: str | None, acts: tuple[str, str], order: str
) -> tuple[Any, Any, str | None]:
    """Run the two requests; return them and the token that the browser has afterwards."""
    requests = {"a": Asked(face, acts[0], token), "b": Asked(face, acts[1], token)}
    for name in order:
        if requests[name].step() and (line := requests[name].set_cookie) is not None:
            token = line.partition("=")[2].partition(";")[0] or None
    return requests["a"], requests["b"], token


def token_of(request: Any) -> str | None:
    line: str | None = request.set_cookie
    return None if line is None else line.partition("=")[2].partition(";")[0]


@pytest.mark.parametrize("begins", ["anonymous", "logged in", "ended", "expired"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_late_response_undoes_nothing(
    own: Face, room: Stillroom, order: str, begins: str
) -> None:
    """Whatever the other request does that is no login itself: the browser keeps what the login, the new token or
    the logout gave it, or what was done to that afterwards."""
    for first, second in product(ACTS, DECIDES):
        user = "ann" if begins == "logged in" else None
        start = room.sessions.create(user, {"cart": ["rye"]}).token
        if begins == "ended":
            room.sessions.destroy(start)
        if begins == "expired":
            short = room.sessions.create(user, {"cart": ["rye"]}, idle=0.001).token
            assert until(lambda short=short: room.sessions.get(short) is None, 5)
            start = short
        one, two, token = browsed(own, start, (first, second), order)
        story = f"{first} and {second}: {one.status}, {two.status}"
        decided = token_of(two)
        had_nothing = begins in ("ended", "expired") and second != "login"
        if first == "login" or decided is None or had_nothing:
            # Both log in: either is the browser's. Or there was nothing to renew or to end any more.
            assert token is None or token == start or room.sessions.get(token), story
        elif order.index("b", order.index("b") + 1) > order.index("a", order.index("a") + 1):
            assert token == (decided or None), story  # it answered last
        elif first in ("logout", "clear") and token is None:
            assert room.sessions.get(decided) is None, (
                story
            )  # the logout ended what the other one had begun
        else:
            assert token == (decided or None), story
        if token is not None and token != start:
            assert room.sessions.get(token) is not None, story


def test_two_logins_at_once_both_succeed(own: Face, room: Stillroom) -> None:
    """When a login button is clicked twice, both succeed and the browser has the last token."""
    for order in ORDERS:
        start = room.sessions.create(None, {"cart": ["rye"]}).token
        one, two, token = browsed(own, start, ("login", "login"), order)
        assert (one.status, two.status) == (200, 200)
        assert token is not None
        found = room.sessions.get(token)
        assert found is not None
        assert found.user_id == "ann"


def test_a_cookie_that_opens_nothing_is_forgotten(own: Face, room: Stillroom) -> None:
    """A request that uses the session forgets a cookie that opens nothing, and its data begins a new session."""
    for end in (room.sessions.destroy, lambda token: room.sessions.destroy_all()):
        start = room.sessions.create("ann", {"cart": ["rye"]}).token
        end(start)
        look, _, token = browsed(own, start, ("look", "look"), "aabb")
        assert (token_of(look), token) == ("", None)
        _, added, token = browsed(own, start, ("look", "add"), "aabb")
        assert token == token_of(added)
        found = room.sessions.get(token or "")
        assert found is not None
        assert found.data == {"cart": ["tea"]}


def test_a_slow_response_forgets_no_cookie(
    own: Face, room: Stillroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow response forgets no cookie, because the browser may have logged in. The next request forgets it."""
    monkeypatch.setattr("stillroom.web.request_session.CLEARS_WITHIN_S", -1.0)
    start = room.sessions.create("ann").token
    room.sessions.destroy(start)
    assert token_of(browsed(own, start, ("look", "look"), "aabb")[0]) is None


def test_a_session_is_not_begun_over_a_login(own: Face, room: Stillroom) -> None:
    """A session begun over a concurrent login is refused with 409, which says to try again with the new cookie."""
    start = room.sessions.create(None, {"cart": ["rye"]}).token
    room.sessions.destroy(start)
    one, two, token = browsed(own, start, ("add", "login"), "abba")
    assert (one.status, one.set_cookie) == (409, None)
    assert isinstance(one.session.failure, SessionEnded)
    assert token == token_of(two)


def test_the_mark_of_a_login_is_soon_gone(own: Face, room: Stillroom, client: Any) -> None:
    """A login's mark lasts a minute; afterwards an old cookie is like any other that opens nothing."""
    start = room.sessions.create(None, {"cart": ["rye"]}).token
    browsed(own, start, ("login", "look"), "aabb")
    (mark,) = client.keys("*:late:*")
    assert 50 < client.ttl(mark) <= 60
    assert token_of(browsed(own, start, ("look", "look"), "aabb")[0]) is None
    client.delete(mark)
    assert token_of(browsed(own, start, ("look", "look"), "aabb")[0]) == ""
