"""Sessions in any order of operations and time, against a model that fits on a page.

Time is moved by making everything in Redis older. Every duration ends in .9 s, so that the moments the test itself
takes decide nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydantic import SecretStr

import redis
from stillroom import SessionConflict, SessionEnded, TooManySessions
from stillroom.embedded import EmbeddedServer
from stillroom.sessions import many
from tests.support.bounded import assert_bounded
from tests.support.crowd import patient_room
from tests.support.entries import Recording
from tests.support.sessions import age_all, sessions_keys

IDLE, ABSOLUTE, GRACE, TOUCH = 118.9, 250.9, 10.9, 5.9  # seconds
HOPS = 8
BITE = 2  # so that three sessions are many

users = st.sampled_from(["u:1", "{u}\n2", None])
named = st.sampled_from(["u:1", "{u}\n2"])
tags = st.sets(st.sampled_from(["mobile", "{s00}"]))
picks = st.integers(0, 9)
keys = st.sampled_from(["a", "b"])


@dataclass
class Modelled:
    """A session of the model."""

    user: str | None
    tags: set[str]
    created: int
    seen: int
    data: dict[str, int] = field(default_factory=dict)
    version: int = 1
    ended: bool = False


@dataclass
class Token:
    """A token that a browser may still send: its grace if it was rotated, and its successor."""

    id: SecretStr
    session: Modelled
    until: float | None = None
    after: Token | None = None
    handle: str = ""


class SessionMachine(RuleBasedStateMachine):
    """A state machine whose rules are what can happen; the invariant asks for every token there ever was."""

    def __init__(self, server: EmbeddedServer) -> None:
        super().__init__()
        self.now = 0
        self.tokens: list[Token] = []
        self.all: list[Modelled] = []
        self.reordered: set[str] = set()
        self.client: Any = redis.Redis.from_url(server.url)
        self.client.flushall()
        self.room = patient_room(
            server.url,
            Recording(),
            session_idle=IDLE,
            session_absolute=ABSOLUTE,
            session_grace=GRACE,
            session_touch=TOUCH,
            session_shards=2,
        )
        self.sessions = self.room.sessions

    def teardown(self) -> None:
        """When everything has ended and was swept, only rotated names and clocks are left."""
        self.advance(1_000)
        self.sessions.sweep(limit=BITE)
        left = [key for key in sessions_keys(self.client) if self.client.type(key) != b"hash"]
        assert left == [], left
        self.room.close()
        self.client.close()

    # The model

    def lives(self, session: Modelled) -> bool:
        deadline = min(session.seen + IDLE, session.created + ABSOLUTE)
        return not session.ended and self.now < deadline

    def opens(self, token: Token) -> Modelled | None:
        """Return the living session that this token opens."""
        for _ in range(HOPS + 1):
            if token.until is None:
                return token.session if self.lives(token.session) else None
            if self.now >= token.until or token.after is None:
                return None
            token = token.after
        return None

    def leads_to(self, token: Token) -> Modelled | None:
        """Return the living session that a handle names, however often it was rotated since."""
        return token.session if self.lives(token.session) else None

    def living(self, user: str | None) -> list[Modelled]:
        return [one for one in self.all if one.user == user and self.lives(one)]

    def pick(self, number: int) -> Token:
        return self.tokens[number % len(self.tokens)]

    def has_tokens(self) -> bool:
        return bool(self.tokens)

    # What can happen

    @rule(
        user=users,
        tags=tags,
        cap=st.sampled_from([None, None, 2, -2]),
        number=st.one_of(st.none(), picks),
    )
    def create(self, user: str | None, tags: set[str], cap: int | None, number: int | None) -> None:
        cap = None if user is None or user in self.reordered else cap
        options: dict[str, Any] = {} if cap is None else {"max_per_user": 2}
        if cap == -2:
            options["on_cap"] = "reject"
        replaced = None
        if number is not None and self.tokens:
            options["replaces"] = self.pick(number).id
            replaced = self.opens(self.pick(number))
        others = [one for one in self.living(user) if one is not replaced]
        try:
            made = self.sessions.create(user, tags=sorted(tags), **options)
        except TooManySessions:
            assert cap == -2
            assert len(others) >= 2
            return
        assert cap != -2 or len(others) < 2
        if cap == 2:
            for evicted in others[: max(0, len(others) - 1)]:
                evicted.ended = True
        if replaced is not None:
            replaced.ended = True
        session = Modelled(user, tags, self.now, self.now)
        self.all.append(session)
        self.tokens.append(Token(made.id, session, handle=made.handle))

    @precondition(has_tokens)
    @rule(number=picks)
    def get(self, number: int) -> None:
        session = self.opens(self.pick(number))
        found = self.sessions.get(self.pick(number).id)
        assert (found is None) == (session is None)
        if session is not None:
            self._touched(session)

    @precondition(has_tokens)
    @rule(number=picks)
    def touch(self, number: int) -> None:
        session = self.opens(self.pick(number))
        assert self.sessions.touch(self.pick(number).id) == (session is not None)
        if session is not None:
            self._touched(session)

    def _touched(self, session: Modelled) -> None:
        if self.now - session.seen >= TOUCH:
            session.seen = self.now

    @precondition(has_tokens)
    @rule(number=picks, key=keys, value=st.integers(0, 9), version=st.sampled_from([None, 0, 1]))
    def update(self, number: int, key: str, value: int, version: int | None) -> None:
        session = self.opens(self.pick(number))
        wanted = None if version is None or session is None else session.version - version
        try:
            new = self.sessions.update(
                self.pick(number).id, {key: value}, remove=["a"], if_version=wanted
            )
        except SessionEnded:
            assert session is None
            return
        except SessionConflict:
            assert version == 1
            return
        assert session is not None
        assert version != 1
        session.data.pop("a", None)
        session.data[key] = value
        session.version += 1
        session.seen = self.now
        assert new == session.version

    @precondition(has_tokens)
    @rule(number=picks, grace=st.sampled_from([0.0, GRACE]))
    def rotate(self, number: int, grace: float) -> None:
        token = self.pick(number)
        session = self.opens(token)
        try:
            fresh = self.sessions.rotate(token.id, grace=grace)
        except SessionEnded:
            assert session is None
            return
        except SessionConflict:
            assert session is not None
            assert token.until is not None
            return
        assert session is not None
        assert token.until is None
        session.seen = self.now
        after = Token(fresh.id, session, handle=fresh.handle)
        token.until, token.after = self.now + grace, after
        self.tokens.append(after)

    @precondition(has_tokens)
    @rule(number=picks)
    def destroy(self, number: int) -> None:
        session = self.opens(self.pick(number))
        assert self.sessions.destroy(self.pick(number).id) == (session is not None)
        if session is not None:
            session.ended = True

    @precondition(has_tokens)
    @rule(number=picks, user=named)
    def end(self, number: int, user: str) -> None:
        token = self.pick(number)
        session = self.leads_to(token)
        mine = session is not None and session.user == user
        assert self.sessions.end(user, token.handle) == mine
        if mine and session is not None:
            session.ended = True

    @rule(user=named, number=st.one_of(st.none(), picks))
    def destroy_for_user(self, user: str, number: int | None) -> None:
        keep = None if number is None or not self.tokens else self.pick(number)
        kept = None if keep is None else self.opens(keep)
        lived = self.living(user)
        count = self.sessions.destroy_for_user(user, keep=None if keep is None else keep.id)
        for session in lived:
            session.ended = session is not kept
        assert count >= sum(session.ended for session in lived)
        if kept is not None:
            self.reordered.add(user)

    @rule(tag=st.sampled_from(["mobile", "{s00}"]))
    def destroy_by_tag(self, tag: str) -> None:
        self.sessions.destroy_by_tag(tag)
        for session in self.all:
            session.ended = session.ended or tag in session.tags

    @rule()
    def sweep(self) -> None:
        assert self.sessions.sweep(limit=BITE)["done"]
        assert self.sessions.count() == len([one for one in self.all if self.lives(one)])

    @rule(seconds=st.sampled_from([1, 5, 9, 60, 110]))
    def advance(self, seconds: int) -> None:
        self.now += seconds
        age_all(self.client, self.room, seconds)

    # What is always so

    @invariant()
    def every_token_opens_what_it_should(self) -> None:
        for token in self.tokens:
            session = self.opens(token)
            found = self.sessions.get(token.id, touch=False)
            assert (found is None) == (session is None), (token, found)
            if found is not None and session is not None:
                assert (found.user_id, set(found.tags)) == (session.user, session.tags)
                assert (found.data, found.version) == (session.data, session.version)

    @invariant()
    def lists_show_who_lives(self) -> None:
        for user in ("u:1", "{u}\n2"):
            assert len(self.sessions.list_for_user(user)) == len(self.living(user))

    @invariant()
    def every_key_has_an_end(self) -> None:
        assert_bounded(self.client)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_sessions_are_what_the_model_says(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    """Sessions agree with the model in any order of operations and time, for every token after each step."""
    monkeypatch.setattr(many, "BITE", BITE)
    run_state_machine_as_test(
        functools.partial(SessionMachine, server),  # type: ignore[arg-type]  # a factory is as good
        settings=settings(
            max_examples=80 if is_full else 40,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
